"""Imported by the fork server that tests/helpers/killable.py starts."""

from helpers import killable

killable.preload()
