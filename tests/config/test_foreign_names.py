"""Flags of Megatron: other names, flags that are not needed, flags that are not supported."""

import re
from functools import partial
from pathlib import Path

import pytest

from helpers.fake_gates import parse
from megatron.config import cli
from megatron.config.flags import index_flags
from megatron.config.foreign_names import ALIASES, ANY, NOT_NEEDED, NOT_SUPPORTED
from megatron.config.schema import SECTIONS
from megatron.moe.gate import available_gates, gate_config_class

PAGE = Path(__file__).resolve().parents[2] / "docs/megatron-names.md"
FOREIGN = [*ALIASES, *NOT_NEEDED, *NOT_SUPPORTED]
WARNING = "flags of Megatron that are not needed and can be left out: "

parse_real = partial(cli.parse, gate_config=gate_config_class, gate_names=available_gates)


def own_flags() -> dict:
    flags = {}
    for gate in available_gates():
        flags |= index_flags({**SECTIONS, "gate_options": gate_config_class(gate)})
    return flags


def test_tables_hold_no_flag_of_ours():
    assert len(set(FOREIGN)) == len(FOREIGN) >= 80
    known = {*own_flags(), *cli.GATE_ALIASES, "--help", "--help-all", "--version", "--config"}
    assert not known & set(FOREIGN), "leave these out of the tables"


@pytest.mark.parametrize("name", ALIASES)
def test_alias_sets_our_flag(name):
    target, _, fixed = ALIASES[name].partition("=")
    flag = own_flags()[target]
    words = [name]
    if flag.type.base is not bool and not fixed:
        words.append("2")  # a valid value of all of them, unlike their defaults
    needed = {
        "jitter": ["--gate=topk"],
        "bias_update_speed": ["--gate=deepseek_v3"],
        "topk_group": ["--gate=deepseek_v3", "--n-group=2"],
        "n_group": ["--gate=deepseek_v3"],
        "load_step": ["--load=x"],
        "override_lr_schedule": ["--load=x"],
        "rope_scaling_factor": ["--rope-scaling=yarn"],
        "yarn_mscale": ["--rope-scaling=yarn", "--yarn-mscale-all-dim=1"],
        "yarn_mscale_all_dim": ["--rope-scaling=yarn"],
        "qk_nope_head_dim": ["--attention=mla"],
        "qk_rope_head_dim": ["--attention=mla"],
    }.get(flag.name, [])
    if flag.name == "jitter":
        words[1] = "0.5"
    experts = (
        ["--num-experts", "4"] if needed or flag.section in ("moe", "gate_options") else []
    )
    expected = parse_real(
        [*experts, *needed, target + ("=" + fixed if fixed else ""), *words[1:]]
    )
    assert parse_real([*experts, *needed, *words]) == expected
    if len(words) > 1:
        joined = f"{name.replace('-', '_').replace('__', '--', 1)}={words[1]}"
        assert parse_real([*experts, *needed, joined]) == expected


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_flag_that_is_not_needed_is_dropped(name, caplog):
    values = NOT_NEEDED[name].values
    for value in ("x",) if values == ANY else values:
        assert parse(name, value, "--num-layers", "3").model.num_layers == 3
        assert parse(f"{name}={value}", "--num-layers", "3").model.num_layers == 3
    if not values:
        assert parse(name, "--num-layers", "3").model.num_layers == 3
    assert set(caplog.messages) == {f"{WARNING}{name} ({NOT_NEEDED[name].reason})"}
    if values == ANY:
        message = rf"{name} is '--num-layers'; allowed: a value. Or leave it out."
        words = [name, "--num-layers", "3"]
    else:
        message = rf"{name} is 'other'; allowed: .*\. Leave it out: "
        words = [name + "=other"]
    with pytest.raises(ValueError, match=message):
        parse(*words)


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_unsupported_flag_says_what_to_do(name):
    for words in ([name], [name, "1"], [f"{name}=1"]):
        with pytest.raises(ValueError) as caught:
            parse(*words)
        assert str(caught.value) == f"{name} is not supported here: {NOT_SUPPORTED[name]}"


def test_advice_names_real_flags():
    known = {*own_flags(), *NOT_NEEDED}
    texts = [*NOT_SUPPORTED.values(), *(flag.reason for flag in NOT_NEEDED.values())]
    for text in texts:
        assert {word.rstrip(",;.") for word in re.findall(r"--[a-z0-9-]+", text)} <= known, text


def test_values_of_dropped_flags_are_not_misread(caplog):
    config = parse(
        "--data-path", "a", "b", "--distributed-backend", "nccl", "--use-flash-attn", "--bf16"
    )
    assert config.data.data_path == ("a", "b") and config.optimizer.bf16
    assert len(caplog.messages) == 1 and "nccl" not in str(config.to_dict())
    with pytest.raises(
        ValueError, match=r"--pipeline-model-parallel-size is '2'; allowed: 1\. "
    ):
        parse("--pipeline-model-parallel-size", "2")
    with pytest.raises(ValueError, match=r"--distributed-backend is ''; allowed: nccl gloo"):
        parse("--distributed-backend")
    with pytest.raises(ValueError, match="unexpected argument '1'"):
        parse("--use-flash-attn", "1")


def test_misspelled_foreign_flag_suggests_its_name():
    with pytest.raises(ValueError, match=r"is no flag; did you mean --use-flash-attn-triton"):
        parse("--use-flash-attention")
    with pytest.raises(ValueError, match=r"is no flag; did you mean --moe-aux-loss-coeff\?"):
        parse("--moe-aux-loss-coef", "1")


def test_page_lists_the_tables():
    rows = re.findall(
        r"^\| `(--[a-z0-9-]+)(?: [^`]*)?` \| (.*) \|$", PAGE.read_text(), re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == sorted(FOREIGN)
    for name, text in rows:
        if name in ALIASES:
            assert text == f"`{ALIASES[name]}`"
        elif name in NOT_NEEDED:
            assert text == re.sub(r"(--[a-z0-9-]+)", r"`\1`", NOT_NEEDED[name].reason)
        else:
            assert text == re.sub(r"(--[a-z0-9-]+)", r"`\1`", NOT_SUPPORTED[name])
