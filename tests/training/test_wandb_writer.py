"""What Weights & Biases gets of a run."""

from __future__ import annotations

import sys
import types

from megatron.training.wandb_writer import WandbWriter


def test_wandb_gets_the_same_scalars(monkeypatch):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((scalars, step))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    writer = WandbWriter("project", "name")
    writer.write({"kind": "train", "iteration": 3, "loss": 1.0, "x_by_layer": [1.0, 2.0]})
    writer.close()
    assert calls == [
        {"project": "project", "name": "name"},
        ({"train/loss": 1.0, "train/x_by_layer/0": 1.0, "train/x_by_layer/1": 2.0}, 3),
        "finish",
    ]
