"""Imported by the server that tests/faults/killable.py forks runs from."""

import killable

killable.preload()
