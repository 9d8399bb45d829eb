"""Stands in for pretrain_gpt.py in tests of studies: the same flags and files, and no training.

The loss falls with the iterations and depends on --moe-loss-coeff and --seed, so that two runs of
the same flags have the same losses. Environment variables make it misbehave:

    FAKE_FAIL       text: cells whose folder contains it print an error and exit with code 2
    FAKE_HOLD       text: cells whose folder contains it stop at their middle until the file
                    `go` appears in their folder
    FAKE_EXPERTS    experts per token that a threshold gate measures (default 2)
    FAKE_IGNORES    text: cells whose folder contains it ignore SIGTERM
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path


def parse(argv: list[str]) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            flags[name] = [value] if equals else []
        else:
            flags[name].append(word)
    return flags


def one(flags: dict[str, list[str]], name: str, default: str = "0") -> str:
    return flags.get(name, [default])[0]


class Run:
    def __init__(self, flags: dict[str, list[str]]):
        self.flags = flags
        self.metrics = Path(one(flags, "metrics-file"))
        self.cell = self.metrics.parent
        self.checkpoint = Path(one(flags, "save")) / "iteration"
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        tokens_per_step = int(one(flags, "global-batch-size")) * int(one(flags, "seq-length"))
        self.iterations = int(one(flags, "train-iters"))
        if not self.iterations:
            self.iterations = math.ceil(int(one(flags, "train-tokens")) / tokens_per_step)
        self.is_stopping = False
        signal.signal(signal.SIGTERM, self.stop)

    def stop(self, *_: object) -> None:
        self.is_stopping = not self.is_misbehaving("FAKE_IGNORES")

    def is_misbehaving(self, variable: str) -> bool:
        text = os.environ.get(variable, "")
        return bool(text) and text in self.cell.name

    def loss(self, iteration: int) -> float:
        coefficient = float(one(self.flags, "moe-loss-coeff", "0.01"))
        if coefficient <= 0:
            return math.nan
        seed = int(one(self.flags, "seed"))
        return 5 - 0.01 * iteration + abs(math.log10(coefficient) + 2) + 0.001 * seed

    def write(self, kind: str, iteration: int) -> None:
        row = {"kind": kind, "iteration": iteration, "loss": self.loss(iteration)}
        if kind == "train":
            experts = 2.0
            if one(self.flags, "gate") == "threshold":
                experts = float(os.environ.get("FAKE_EXPERTS", "2"))
            row["flops_per_token"] = 1000.0 * experts
            row |= {"experts_per_token": experts, "experts_per_token_by_layer": [experts]}
        with open(self.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")

    def train(self) -> int:
        start = 0
        if self.checkpoint.exists():
            start = int(self.checkpoint.read_text())
        print(f"starting at iteration {start}", flush=True)
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"kind": "run", "iteration": start}) + "\n")
        if not start:
            self.write("eval", 0)
        for iteration in range(start + 1, self.iterations + 1):
            self.write("train", iteration)
            if iteration == self.iterations // 2 and self.is_misbehaving("FAKE_HOLD"):
                self.hold()
            save_interval = int(one(self.flags, "save-interval"))
            if self.is_stopping or (save_interval and iteration % save_interval == 0):
                self.checkpoint.write_text(str(iteration))
            if self.is_stopping:
                return 0
        if self.is_misbehaving("FAKE_FAIL"):
            print("error: the fake run fails", flush=True)
            return 2
        self.write("eval", self.iterations)
        self.checkpoint.write_text(str(self.iterations))
        return 0

    def hold(self) -> None:
        (self.cell / "holds").touch()
        while not (self.cell / "go").exists() and not self.is_stopping:
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(Run(parse(sys.argv[1:])).train())
