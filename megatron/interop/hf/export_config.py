"""config.json of an exported model that came from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.effect import reset_without_effect
from megatron.config.schema import RunConfig
from megatron.interop.hf.config_map import config_json_of, run_config_of
from megatron.interop.hf.family import Family


def merged_config(
    family: Family, original: Mapping[str, Any], run: RunConfig
) -> dict[str, Any]:
    """Return the original config.json with what training has changed.

    Keys whose value still means the same keep their spelling, such as rope_theta instead of
    rope_parameters, and a coefficient is not rounded by its conversion.

    Args:
        original: Content of the folder's config.json.
        run: Configuration of the checkpoint.
    """
    origin = run_config_of(family, original, run.tokenizer)
    # A training run resets settings without effect, such as the width of dense layers in a model
    # without any: these are no changes.
    before = config_json_of(family, reset_without_effect(origin))
    after = config_json_of(family, reset_without_effect(run))
    changed = {key for key, value in after.items() if before.get(key) != value}
    changed -= {"architectures", "model_type", "dtype"}
    merged = dict(original)
    for rule in family.config:
        # All keys of a rule together: some of them replace others.
        if changed.intersection(rule.keys):
            for key in rule.keys:
                merged.pop(key, None)
            merged |= rule.to_theirs(run)
    return merged
