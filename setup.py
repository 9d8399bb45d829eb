"""Entry point for setuptools; the configuration is in pyproject.toml."""

from setuptools import setup

setup()
