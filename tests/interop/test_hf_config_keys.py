"""Every key of the installed configuration classes is decided, and defaults are theirs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from helpers.hf_models import families_under_test
from helpers.hf_variants import FAMILIES
from megatron.interop.hf.config_map import COMMON_KEYS
from megatron.interop.hf.registry import all_families, find_family
from megatron.interop.hf.unsupported import UNSUPPORTED, unsupported_reason, unsupported_table
from megatron.moe.released_routers import NOT_EXPRESSED, RELEASED_ROUTERS

pytest.importorskip("transformers", reason="the reference implementations are not installed")

REPO = Path(__file__).resolve().parents[2]
every_family = pytest.mark.parametrize("model_type", families_under_test())


def config_class(model_type):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def fields_of(model_type):
    """Default by key of a configuration class, before it completes them."""
    return {field.name: field.default for field in dataclasses.fields(config_class(model_type))}


@every_family
def test_every_key_is_decided(model_type):
    """A new key of a later transformers has to be mapped, ignored or required to have a value."""
    family = find_family(model_type)
    written = config_class(model_type)().to_dict()
    keys = {*written, *fields_of(model_type)}
    undecided = keys - family.known_keys - COMMON_KEYS
    assert undecided == set()


@every_family
def test_defaults_are_those_of_transformers(model_type):
    """config.json may leave out keys that have the class's default."""
    family = find_family(model_type)
    theirs = fields_of(model_type)
    mapped = config_class(model_type).attribute_map
    names = {name: key for key, name in family.aliases.items()}
    compared = 0
    for key, value in family.defaults.items():
        spellings = {key, names.get(key, key), mapped.get(key, key)}
        found = [theirs[spelling] for spelling in spellings if spelling in theirs]
        if found:
            assert value == found[0], key
            compared += 1
    assert compared > 12


def test_all_families_are_tested():
    assert {*all_families()} - {"moe_megatron"} <= {*FAMILIES}


def test_every_router_family_is_decided():
    """A new MoE family of transformers gets a converter, or a reason why it has none."""
    families = {name.split("/")[0] for name in [*RELEASED_ROUTERS, *NOT_EXPRESSED]}
    undecided = {name for name in families - {*all_families()} if not unsupported_reason(name)}
    assert undecided <= {*FAMILIES}
    assert not {*all_families()} & {*UNSUPPORTED}


def test_documentation_has_all_families():
    text = (REPO / "docs/huggingface.md").read_text(encoding="utf-8")
    assert unsupported_table() in text
    assert [name for name in all_families() if f"`{name}`" not in text] == []


def test_unsupported_model_type_has_a_reason():
    with pytest.raises(ValueError, match=r"'qwen3_next', which is not supported: .*delta rule"):
        find_family("qwen3_next")
    with pytest.raises(ValueError, match="'llama4_text', which is not supported"):
        find_family("llama4_text")
    with pytest.raises(ValueError, match="allowed: .*mixtral"):
        find_family("bert")
