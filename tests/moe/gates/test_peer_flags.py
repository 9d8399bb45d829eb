"""PEER's options: refused values, and the MoE fields that its flags determine."""

from pathlib import Path

import pytest

from megatron.config.cli import parse
from megatron.config.run_json import write_run_json
from megatron.moe.gate import available_gates, create_gate, gate_class, gate_config_class


def make(num_experts=12, **options):
    options = {"peer_num_heads": 2, "peer_topk": 3, "peer_query_size": 12, **options}
    return create_gate("peer", hidden_size=6, num_experts=num_experts, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"peer_num_heads": 0}, "--peer-num-heads is 0; allowed: 1 or more"),
        ({"peer_topk": 0}, "--peer-topk is 0; allowed: 1 or more"),
        (
            {"peer_expert_hidden_size": -1},
            "--peer-expert-hidden-size is -1; allowed: 0 or more",
        ),
        ({"peer_query_size": 0}, "--peer-query-size is 0; allowed: 1 or more"),
        (
            {"peer_query_size": 7},
            "--peer-query-size is 7; allowed: a multiple of the 2 dimensions",
        ),
        (
            {"peer_query_size": 8, "peer_product_key_dim": (2, 2, 3)},
            "--peer-query-size is 8; .* of the 3 dimensions",
        ),
        (
            {"peer_product_key_dim": (-3, -4)},
            r"--peer-product-key-dim is \(-3, -4\); allowed: positive integers",
        ),
        (
            {"peer_product_key_dim": (3, 5)},
            r"--peer-product-key-dim is \(3, 5\); allowed: product 12, the number of exp",
        ),
        (
            {"peer_num_experts": 13},
            "--peer-num-experts is 13; allowed: 0 or 12, the number of experts",
        ),
        (
            {"peer_query_norm": "group"},
            "--peer-query-norm is 'group'; allowed: batch layer none",
        ),
        ({"score_function": "tanh"}, "--score-function is 'tanh'; allowed: softmax sigmoid"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options, moe, expected",
    [
        (
            {"peer_num_experts": 16},
            {},
            {"num_experts": 16, "moe_ffn_hidden_size": 1, "moe_layers": (2,)},
        ),
        (
            {"peer_layers": (0, 4)},
            {"num_experts": 16},
            {"num_experts": 16, "moe_ffn_hidden_size": 1, "moe_layers": (0, 4)},
        ),
        (
            {"peer_product_key_dim": (3, 5), "peer_expert_hidden_size": 4},
            {"num_experts": 0},
            {"num_experts": 15, "moe_ffn_hidden_size": 4, "moe_layers": (2,)},
        ),
        (
            {"peer_num_experts": 16, "peer_product_key_dim": (2, 8)},
            {"num_experts": 16},
            {"num_experts": 16, "moe_ffn_hidden_size": 1, "moe_layers": (2,)},
        ),
    ],
)
def test_moe_overrides(options, moe, expected):
    assert gate_class("peer").Config(**options).moe_overrides(moe, 5) == expected


def test_flags_set_experts_and_block():
    """The number of experts, their width and the block come from PEER's own flags."""
    run = parse(
        [
            "--gate",
            "peer",
            "--peer-product-key-dim",
            "3",
            "4",
            "--peer-expert-hidden-size",
            "2",
            "--num-layers",
            "3",
        ],
        gate_config_class,
        available_gates,
    )
    assert run.gate_options["peer"]["peer_product_key_dim"] == (3, 4)
    assert (run.moe.num_experts, run.moe.moe_ffn_hidden_size, run.moe.moe_layers) == (
        12,
        2,
        (1,),
    )
    assert [run.moe.is_moe_layer(i) for i in range(3)] == [False, True, False]


def test_moe_flags_apply_without_peer_flags():
    argv = ["--gate", "peer", "--num-experts", "16", "--num-layers", "4"]
    run = parse(
        [*argv, "--moe-ffn-hidden-size", "3", "--expert-interval", "2"],
        gate_config_class,
        available_gates,
    )
    assert run.moe.moe_ffn_hidden_size == 3 and [run.moe.is_moe_layer(i) for i in range(4)] == [
        0,
        1,
        0,
        1,
    ]
    assert parse(
        [*argv, "--moe-layers", "0", "3"], gate_config_class, available_gates
    ).moe.moe_layers == (0, 3)
    for flag, own in (
        ("--moe-ffn-hidden-size", "--peer-expert-hidden-size"),
        ("--moe-layers", "--peer-layers"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"{flag} is .*3.*; allowed: .*2.*, as --gate peer and its flags say",
        ):
            parse([*argv, flag, "3", own, "2"], gate_config_class, available_gates)


def test_flags_override_stored_derived_fields(tmp_path, caplog):
    """run.json also holds derived fields; PEER, layer and gate flags start from the set
    ones.
    """
    stored = str(tmp_path / "run.json")

    def again(*flags):
        return parse(["--config", stored, *flags], gate_config_class, available_gates).moe

    argv = ["--gate", "peer", "--peer-product-key-dim", "8", "8", "--num-layers", "4"]
    write_run_json(parse(argv, gate_config_class, available_gates), stored)
    assert (again().num_experts, again().moe_layers, again().moe_ffn_hidden_size) == (
        64,
        (2,),
        1,
    )
    assert again("--peer-layers", "1").moe_layers == (1,) and again(
        "--num-layers", "6"
    ).moe_layers == (3,)
    assert again("--peer-expert-hidden-size", "2").moe_ffn_hidden_size == 2
    assert again("--peer-product-key-dim", "4", "4").num_experts == 16
    changed = again("--gate", "topk", "--num-experts", "4")
    assert (changed.num_experts, changed.moe_layers, changed.moe_ffn_hidden_size) == (4, (), 0)
    assert (
        "with the --num-experts --moe-ffn-hidden-size --moe-layers that came from them"
        in caplog.text
    )
    Path(stored).write_text(
        Path(stored).read_text().replace('"gate": "peer"', '"gate": "gone"')
    )
    assert again("--gate", "topk", "--num-experts", "4").num_experts == 4, (
        "a gate that is gone may be replaced"
    )
    flags = [
        "--gate",
        "peer",
        "--num-experts",
        "16",
        "--moe-ffn-hidden-size",
        "3",
        "--moe-layers",
        "0",
        "3",
        "--num-layers",
        "4",
    ]
    write_run_json(parse(flags, gate_config_class, available_gates), stored)
    assert (
        again() == parse(flags, gate_config_class, available_gates).moe
        and again("--seed", "1").moe_ffn_hidden_size == 3
    )


@pytest.mark.parametrize(
    "options, moe, message",
    [
        ({}, {}, "--peer-num-experts is 0; allowed: a positive integer without --num-experts"),
        ({"peer_num_experts": -4}, {}, "--peer-num-experts is -4; allowed: a positive integer"),
        (
            {"peer_num_experts": 16},
            {"num_experts": 8},
            "--peer-num-experts is 16; allowed: 0 or 8, the number of experts",
        ),
        (
            {"peer_product_key_dim": (3, 5)},
            {"num_experts": 8},
            r"--peer-product-key-dim is \(3, 5\); allowed: product 8",
        ),
        (
            {"peer_layers": (1, 5)},
            {"num_experts": 8},
            r"--peer-layers is \(1, 5\); allowed: numbers of blocks, 0 to 4",
        ),
        (
            {"peer_layers": (-1,)},
            {"num_experts": 8},
            r"--peer-layers is \(-1,\); allowed: numbers of blocks, 0 to 4",
        ),
    ],
)
def test_inconsistent_moe_flags_are_refused(options, moe, message):
    with pytest.raises(ValueError, match=message):
        gate_class("peer").Config(**options).moe_overrides(moe, 5)
