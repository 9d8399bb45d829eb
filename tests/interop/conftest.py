"""Folders of random transformers models, saved once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from helpers.hf_conversion import Imported, import_model
from helpers.hf_models import HFCase, hf_model, save_hf


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory) -> Callable[[HFCase], Path]:
    """The folder of a case in fp32, as its family is released; tests must not change it."""
    root = tmp_path_factory.mktemp("hf")

    @cache
    def folder(case: HFCase) -> Path:
        return save_hf(hf_model(case), root / str(case))

    return folder


@pytest.fixture(scope="session")
def imported(hf_folder) -> Callable[[HFCase], Imported]:
    """Our model of a case; tests must not change its weights."""

    @cache
    def model(case: HFCase) -> Imported:
        return import_model(hf_folder(case))

    return model
