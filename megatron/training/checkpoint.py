"""Checkpoints: what a run needs to go on exactly where it stopped, and the check that it is the same run.

    <save>/iter_0000300/   DeepSpeed's files, run.json (the configuration, fit for --config), identity.json (tokenizer,
                           number of ranks), rng_rank0.pt, ...
    <save>/latest          name of the newest complete checkpoint, written last
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.config import cli
from megatron.config.schema import RunConfig
from megatron.data.tokenizer import Tokenizer
from megatron.log import get_logger
from megatron.moe import gates
from megatron.parallel import rng
from megatron.parallel.groups import Groups
from megatron.training.engine import Engine


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0


IDENTITY = {"tokenizer_name": "the tokenizer", "tokenizer_vocab_size": "the vocabulary size",
            "tokenizer_fingerprint": "the hash of the vocabulary", "world_size": "the number of ranks"}
# What must be equal between a checkpoint and the run that loads it, by section of the configuration.
FIXED = {
    "model": ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
              "position_embedding_type", "rotary_base", "normalization", "norm_epsilon", "activation", "swiglu",
              "untie_embeddings_and_output_weights", "vocab_size", "make_vocab_size_divisible_by"),
    "moe": ("num_experts", "expert_interval", "moe_layers", "gate", "moe_ffn_hidden_size", "moe_shared_experts",
            "moe_first_k_dense", "moe_expert_parallel_size"),
    "optimizer": ("zero_stage", "bf16", "fp16"),
}


@dataclass(frozen=True)
class Record:
    """What a run is: saved with every checkpoint, compared when one is loaded."""

    config: RunConfig
    identity: dict[str, Any]
    """the tokenizer's name, vocab_size and fingerprint, and world_size"""

    @staticmethod
    def of(config: RunConfig, groups: Groups, tokenizer: Tokenizer) -> Record:
        names = ("name", "vocab_size", "fingerprint")
        return Record(config, {**{f"tokenizer_{n}": getattr(tokenizer, n) for n in names},
                               "world_size": groups.world_size})


def save(folder: str, engine: Engine, progress: Progress, record: Record, groups: Groups) -> None:
    """Write a checkpoint; `latest` names it only once every rank has finished."""
    tag = f"iter_{progress.iteration:07d}"
    target = Path(folder) / tag
    engine.save(folder, tag, asdict(progress))
    torch.save(rng.get_state(), target / f"rng_rank{groups.rank}.pt")
    if groups.is_first:
        cli.write_run_json(record.config, target / "run.json")
        cli.write_text(target / "identity.json", json.dumps(record.identity, indent=1))
    _barrier(groups)
    if groups.is_first:
        cli.write_text(Path(folder) / "latest", tag)
        get_logger().info("saved %s", target)
    _barrier(groups)


def latest(folder: str) -> str:
    """Name of the newest complete checkpoint in `folder`.

    Raises:
        FileNotFoundError: there is none.
    """
    marker = Path(folder) / "latest"
    if not marker.is_file():
        raise FileNotFoundError(f"--load is {folder!r}, which holds no checkpoint (no file {marker}); "
                                "point --load at the folder given to --save of an earlier run, or leave it out")
    return marker.read_text().strip()


def read_record(folder: str) -> Record:
    """What the newest checkpoint in `folder` says of its run.

    Raises:
        FileNotFoundError: no checkpoint, or one without its two JSON files.
    """
    target = Path(folder) / latest(folder)
    for name in ("run.json", "identity.json"):
        if not (target / name).is_file():
            raise FileNotFoundError(f"checkpoint {target} has no {name}; it is incomplete or not one of ours")
    return Record(cli.read_run_json(target / "run.json"), json.loads((target / "identity.json").read_text()))


def check(folder: str, record: Record) -> None:
    """Whether the newest checkpoint of `folder` can be loaded by this run: to be asked before building anything.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it contradicts this run's model, experts, tokenizer or topology.
    """
    saved = read_record(folder)
    check_same_run(saved, record, f"{folder}/{latest(folder)}")
    warn_of_new_order(saved, record)


def load(folder: str, engine: Engine, groups: Groups) -> Progress:
    """Restore the newest checkpoint of `folder`: weights, optimizer, random state; returns how far the run was.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: DeepSpeed cannot read it. Whether it fits this run is what `check` says.
    """
    tag = latest(folder)
    state = engine.load(folder, tag)
    rng.set_state(torch.load(Path(folder) / tag / f"rng_rank{groups.rank}.pt", weights_only=True))
    progress = Progress(**{k: state[k] for k in asdict(Progress())})
    get_logger().info("resumed from %s/%s at iteration %d", folder, tag, progress.iteration)
    return progress


# What decides the order of the samples: a change is allowed, and said.
ORDER = {
    "model": ("seq_length",),
    "data": ("data_path", "train_data_path", "split", "dataloader_type", "streaming_data_path", "streaming_json_key",
             "streaming_shuffle_samples"),
    "train": ("seed", "train_iters", "train_tokens", "global_batch_size"),
}


def warn_of_new_order(saved: Record, current: Record) -> None:
    """Warn when a resumed run will not see the samples that the saved run would have gone on with."""
    # The order of streamed text does not depend on the run's length.
    fixed = ("train_iters", "train_tokens") if current.config.data.streaming_data_path else ()
    changed = [f"--{name.replace('_', '-')}" for section, names in ORDER.items() for name in names if name not in fixed
               and getattr(getattr(saved.config, section), name) != getattr(getattr(current.config, section), name)]
    if changed:
        get_logger().warning("%s differ(s) from the checkpoint's: the samples come in another order from here on, and "
                             "some of those already seen may come again", " ".join(changed))


def check_same_run(saved: Record, current: Record, where: str) -> None:
    """Raise ValueError naming the first thing in which a checkpoint contradicts the run that wants to load it."""
    for section, names in FIXED.items():
        for name in names:
            _same(getattr(getattr(saved.config, section), name), getattr(getattr(current.config, section), name),
                  "--" + name.replace("_", "-"), where)
    if _gate_shapes(saved.config) != _gate_shapes(current.config):
        for name, value in current.config.gate_options.items():
            _same(saved.config.gate_options.get(name), value, "--" + name.replace("_", "-"), where)
    for key, what in IDENTITY.items():
        _same(saved.identity.get(key), current.identity[key], what, where)
    if current.config.model.position_embedding_type == "learned":
        _same(saved.config.model.max_positions, current.config.model.max_positions, "--max-position-embeddings", where)


def _gate_shapes(config: RunConfig) -> dict[str, torch.Size]:
    """Names and shapes of what a gate of the run keeps: options that change them cannot change in a resume."""
    if not config.moe.num_experts:
        return {}
    with torch.device("meta"):
        gate = gates.create(config.moe.gate, hidden_size=config.model.hidden_size, num_experts=config.moe.num_experts,
                            layer=1, num_moe_layers=2, vocab_size=1, **config.gate_options)
    return {name: tensor.shape for name, tensor in gate.state_dict().items()}


def _same(saved: Any, current: Any, what: str, where: str) -> None:
    if saved != current:
        raise ValueError(f"{what} is {current!r} but checkpoint {where} was made with {saved!r}; "
                         "use the checkpoint's value, or start a new run without --load")


def _barrier(groups: Groups) -> None:
    if groups.world_size > 1:
        dist.barrier()
