"""Finding a checkpoint and refusing one of another run; whole save and resume runs are in tests/test_pretrain.py."""

import json
import re

import pytest

from megatron import log
from megatron.config import cli
from megatron.config.schema import ModelConfig, MoEConfig, OptimizerConfig, RunConfig, TrainConfig
from megatron.training import checkpoint
from megatron.training.checkpoint import FIXED, Record, check_same_run

IDENTITY = {"tokenizer_name": "a", "tokenizer_vocab_size": 10, "tokenizer_fingerprint": "f", "world_size": 2}


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="which holds no checkpoint"):
        checkpoint.latest(str(tmp_path))


def test_an_incomplete_checkpoint_is_named(tmp_path):
    (tmp_path / "latest").write_text("iter_0000005\n")
    (tmp_path / "iter_0000005").mkdir()
    with pytest.raises(FileNotFoundError, match="iter_0000005 has no run.json"):
        checkpoint.read_record(str(tmp_path))
    cli.write_run_json(RunConfig(), tmp_path / "iter_0000005/run.json")
    with pytest.raises(FileNotFoundError, match="iter_0000005 has no identity.json"):
        checkpoint.read_record(str(tmp_path))
    (tmp_path / "iter_0000005/identity.json").write_text(json.dumps(IDENTITY))
    assert checkpoint.read_record(str(tmp_path)).identity == IDENTITY


def test_what_must_be_equal_are_fields_of_the_configuration():
    for section, names in FIXED.items():
        for name in names:
            assert hasattr(getattr(RunConfig(), section), name)


def test_contradictions_are_named():
    saved = Record(RunConfig(), IDENTITY)
    assert check_same_run(saved, Record(RunConfig(), dict(IDENTITY)), "x") is None
    with pytest.raises(ValueError, match=r"--num-layers is 8 but checkpoint x was made with 4; use the checkpoint's"):
        check_same_run(saved, Record(RunConfig(model=ModelConfig(num_layers=8)), IDENTITY), "x")
    for key, what in checkpoint.IDENTITY.items():
        with pytest.raises(ValueError, match=f"{what} is 'other'"):
            check_same_run(saved, Record(RunConfig(), {**IDENTITY, key: "other"}), "x")


def test_changing_the_length_or_rate_of_the_run_is_allowed():
    other = RunConfig(optimizer=OptimizerConfig(lr=1.0), train=TrainConfig(train_iters=7, micro_batch_size=9))
    assert check_same_run(Record(RunConfig(), IDENTITY), Record(other, IDENTITY), "x") is None


def test_a_new_order_of_samples_is_said(capsys):
    log.setup()
    saved = Record(RunConfig(), IDENTITY)
    checkpoint.warn_of_new_order(saved, Record(RunConfig(optimizer=OptimizerConfig(lr=1.0)), IDENTITY))
    assert capsys.readouterr().out == ""
    checkpoint.warn_of_new_order(saved, Record(RunConfig(train=TrainConfig(train_iters=7, seed=2)), IDENTITY))
    assert "--seed --train-iters differ(s) from the checkpoint's" in capsys.readouterr().out


def test_learned_positions_must_be_as_many():
    def learned(n):
        return Record(RunConfig(model=ModelConfig(position_embedding_type="learned", max_position_embeddings=n)),
                      IDENTITY)

    with pytest.raises(ValueError, match="--max-position-embeddings is 512 but checkpoint x was made with 256"):
        check_same_run(learned(256), learned(512), "x")


@pytest.mark.parametrize("gate, option, old, new", [
    ("peer", "peer_num_heads", 4, 2), ("peer", "peer_query_norm", "batch", "layer"),
    ("peer", "peer_product_key_dim", (8, 2), (4, 4)), ("moepp", "num_zero_experts", 1, 2), ("cosine", "proj_dim", 4, 5),
    ("tcmoe", "topk", 2, 3),
])
def test_options_that_shape_the_gate_cannot_change(gate, option, old, new):
    def record(value):
        moe = MoEConfig(num_experts=16, gate=gate)
        return Record(RunConfig(moe=moe, gate_options={option: value}), IDENTITY)

    flag = "--" + option.replace("_", "-")
    with pytest.raises(ValueError, match=f"{flag} is {re.escape(repr(new))} but checkpoint x was made with "
                                         f"{re.escape(repr(old))}"):
        check_same_run(record(old), record(new), "x")


def test_options_that_leave_the_gates_shape_alone_may_change():
    def record(**options):
        return Record(RunConfig(moe=MoEConfig(num_experts=4, gate="topk"), gate_options=options), IDENTITY)

    assert check_same_run(record(topk=2, loss_coeff=0.01), record(topk=3, loss_coeff=0.1), "x") is None
