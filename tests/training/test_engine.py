"""The engine's own refusals; what it computes is in tests/moe/test_deepspeed.py."""

import json

import pytest
from torch import nn

from megatron.config.schema import OptimizerConfig, TrainConfig
from megatron.parallel.groups import Groups
from megatron.pretrain import lost_rank


def test_fp16_needs_a_gpu():
    from megatron.training.engine import Engine

    with pytest.raises(ValueError, match="--fp16 is True; allowed: only with a GPU. Use --bf16"):
        Engine(nn.Linear(1, 1), OptimizerConfig(fp16=True), TrainConfig(), Groups())


def test_what_deepspeed_refuses_is_one_line(tmp_path):
    from megatron.training.engine import Engine

    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"no_such_key": 1}}))
    with pytest.raises(ValueError, match="DeepSpeed refuses .*ds.json: .*no_such_key") as caught:
        Engine(nn.Linear(1, 1), OptimizerConfig(deepspeed_config=str(path)), TrainConfig(), Groups())
    assert "\n" not in str(caught.value)


class Unreadable:
    def load_checkpoint(self, folder, tag):
        return None, None


def test_a_checkpoint_that_deepspeed_cannot_read():
    from megatron.training.engine import Engine

    engine = Engine.__new__(Engine)
    engine.deepspeed = Unreadable()
    with pytest.raises(ValueError, match="DeepSpeed could not read checkpoint iter_1 in folder"):
        engine.load("folder", "iter_1")


def test_a_lost_rank_is_told_from_other_errors():
    assert "another rank ended" in str(lost_rank(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:3")))
    assert lost_rank(RuntimeError("size mismatch")) is None
