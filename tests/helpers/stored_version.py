"""Program that stores the checkpoint of the current format version for test_old_checkpoints.py.

    PYTHONPATH=.:tests python -m helpers.stored_version tests/checkpoint/versions

It trains the model of `CONFIG` for two steps, saves, trains two more, and writes their losses
to expected.json. Run it again whenever a version that is not released yet changes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from helpers import engines
from helpers.spawn import Ranks
from megatron.config.format_version import FORMAT_VERSION
from megatron.config.schema import (
    CheckpointConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

CONFIG = RunConfig(
    ModelConfig(
        num_layers=2,
        hidden_size=4,
        ffn_hidden_size=4,
        num_attention_heads=1,
        seq_length=8,
        activation="swiglu",
        init_method_std=0.3,
        make_vocab_size_divisible_by=1,
        vocab_size=engines.MODEL.vocab_size,
    ),
    MoEConfig(num_experts=2, gate="threshold", moe_ffn_hidden_size=4),
    optimizer=OptimizerConfig(bf16=True, lr=0.02, adam_eps=1e-3, clip_grad=0.5),
    train=TrainConfig(micro_batch_size=1, global_batch_size=engines.GLOBAL_BATCH),
    gate_options={"threshold": {"threshold": 0.6, "loss_coeff": 0.5}},
)
"""Two MoE layers, whose auxiliary losses are large enough to show in the losses"""


def store(folder: Path) -> None:
    """Write checkpoint and expected values to the folder of the version, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)  # run.json then has no path of this machine
    checkpoint = CheckpointConfig(save="checkpoints")
    ranks = Ranks(1)
    try:
        results = ranks.run(engines.train, replace(CONFIG, checkpoint=checkpoint), 2, 2)
    finally:
        ranks.stop()
    expected = {
        "iteration": 2,
        "tensors_sha256": engines.tensors_sha256("checkpoints"),
        "losses_after": results[0][1],
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    store(Path(sys.argv[1]) / str(FORMAT_VERSION))
