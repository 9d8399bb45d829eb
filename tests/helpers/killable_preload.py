"""Imported by the server that tests/helpers/killable.py forks runs from."""

from helpers import killable

killable.preload()
