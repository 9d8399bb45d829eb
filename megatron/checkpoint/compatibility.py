"""Whether a run may resume from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from megatron.checkpoint.metadata import RunMetadata
from megatron.config.schema import RunConfig
from megatron.log import get_logger
from megatron.moe.gate import create_gate

MODEL_FIELDS = {
    "tokenizer_name": "the tokenizer",
    "tokenizer_vocab_size": "the vocabulary size",
    "tokenizer_fingerprint": "the hash of the vocabulary",
}

# What the learning rate of an iteration follows from; the length of the run as well.
SCHEDULE_FIELDS = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_warmup_fraction",
    "lr_warmup_tokens",
    "lr_decay_iters",
    "lr_decay_tokens",
    "lr_wsd_decay_fraction",
)

# What decides the order of the samples: a change is allowed, and said.
DATA_ORDER_FIELDS = {
    "model": ("seq_length",),
    "data": (
        "data_path",
        "train_data_path",
        "split",
        "dataloader_type",
        "streaming_data_path",
        "streaming_json_key",
        "streaming_shuffle_samples",
    ),
    "train": ("seed", "train_iters", "train_tokens"),
}


def check_same_run(saved: RunMetadata, current: RunMetadata, where: str) -> None:
    """Raise ValueError naming the first thing in which a checkpoint contradicts the run that wants its weights."""
    for key, what in MODEL_FIELDS.items():
        _same(saved.identity.get(key), current.identity[key], what, where)
    theirs, ours = _shape(saved), _shape(current)
    for what in ours:
        _same(theirs.get(what), ours[what], what, where)
    if _gate_shapes(saved.config) != _gate_shapes(current.config):
        for name, value in current.config.gate_options.items():
            _same(
                saved.config.gate_options.get(name), value, "--" + name.replace("_", "-"), where
            )
    if current.config.model.position_embedding_type == "learned":
        _same(
            saved.config.model.max_positions,
            current.config.model.max_positions,
            "--max-position-embeddings",
            where,
        )


def _shape(run: RunMetadata) -> dict[str, Any]:
    """What must be equal between a checkpoint and the run that loads it, however it was said: by flag."""
    model, moe = run.config.model, run.config.moe
    plain = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "position_embedding_type",
        "rotary_base",
        "normalization",
        "norm_epsilon",
        "untie_embeddings_and_output_weights",
    )
    shape = {"--" + name.replace("_", "-"): getattr(model, name) for name in plain}
    vocab_size = model.vocab_size or run.identity["tokenizer_vocab_size"]
    shape |= {
        "--ffn-hidden-size": model.ffn_size,
        "--num-query-groups": model.query_groups,
        "--kv-channels": model.head_size,
        "--activation": model.act,
        "the padded vocabulary size": model.padded_vocab(vocab_size),
        "--num-experts": moe.num_experts,
    }
    if moe.num_experts:
        shape |= {
            "the list of mixture layers": [
                i for i in range(model.num_layers) if moe.is_moe_layer(i)
            ],
            "--gate": moe.gate,
            "--moe-shared-experts": moe.moe_shared_experts,
            "--moe-ffn-hidden-size": moe.moe_ffn_hidden_size or model.ffn_size,
        }
    return shape


def check_same_schedule(saved: RunMetadata, current: RunMetadata, where: str) -> None:
    """Raise ValueError when a run that goes on would have other learning rates than it would have had."""
    old, new = saved.config.optimizer, current.config.optimizer
    advice = "use the checkpoint's value, or add --override-lr-schedule to go on with this one"
    for name in SCHEDULE_FIELDS:
        _same(
            getattr(old, name), getattr(new, name), "--" + name.replace("_", "-"), where, advice
        )
    tokens = [
        f"--{name.replace('_', '-')}"
        for name in ("lr_warmup_tokens", "lr_decay_tokens")
        if getattr(new, name)
    ]
    if tokens:
        _same(
            saved.global_batch_size,
            current.global_batch_size,
            f"the global batch, in which {' and '.join(tokens)} is counted,",
            where,
            advice,
        )
    ends = new.lr_decay_iters or new.lr_decay_tokens
    if new.lr_warmup_fraction or not (ends or new.lr_decay_style == "constant"):
        _same(
            saved.iterations,
            current.iterations,
            "the run's number of iterations, which its learning rates follow,",
            where,
            advice,
        )


def warn_of_changes(saved: RunMetadata, current: RunMetadata) -> None:
    """Log in what a run that goes on differs from the one that was saved without contradicting it."""
    # The order of streamed text does not depend on the run's length.
    fixed = ("train_iters", "train_tokens") if current.config.data.streaming_data_path else ()
    changed = [
        f"--{name.replace('_', '-')}"
        for section, names in DATA_ORDER_FIELDS.items()
        for name in names
        if name not in fixed
        and getattr(getattr(saved.config, section), name)
        != getattr(getattr(current.config, section), name)
    ]
    if saved.global_batch_size != current.global_batch_size:
        changed.append(
            f"the global batch ({current.global_batch_size} samples after {saved.global_batch_size})"
        )
    changed += [
        f"the files of {prefix}"
        for prefix, files in current.data.items()
        if saved.data.get(prefix, files) != files
    ]
    if changed:
        get_logger().warning(
            "%s differ(s) from the checkpoint's: the samples come in another order from here on, and "
            "some of those already seen may come again",
            ", ".join(changed),
        )
    old, new = saved.config.gate_options, current.config.gate_options
    options = [
        f"--{name.replace('_', '-')} {value} after {old[name]}"
        for name, value in new.items()
        if old.get(name, value) != value
    ]
    if options:
        get_logger().warning(
            "the gate goes on with other options than the checkpoint's: %s", ", ".join(options)
        )
    if saved.topology != current.topology:
        words = [
            ", ".join(
                f"{name.replace('_', ' ')} {value}" for name, value in run.topology.items()
            )
            for run in (saved, current)
        ]
        get_logger().info("the checkpoint was made with %s; the run goes on with %s", *words)


def _gate_shapes(config: RunConfig) -> dict[str, torch.Size]:
    """Names and shapes of what a gate of the run keeps: options that change them cannot change in a resume."""
    if not config.moe.num_experts:
        return {}
    with torch.device("meta"):
        gate = create_gate(
            config.moe.gate,
            hidden_size=config.model.hidden_size,
            num_experts=config.moe.num_experts,
            layer=1,
            num_moe_layers=2,
            vocab_size=1,
            **config.gate_options,
        )
    return {name: tensor.shape for name, tensor in gate.state_dict().items()}


def _same(
    saved: Any,
    current: Any,
    what: str,
    where: str,
    advice: str = "use the checkpoint's value, or start a new run without --load",
) -> None:
    if saved != current:
        raise ValueError(
            f"{what} is {current!r} but checkpoint {where} was made with {saved!r}; {advice}"
        )
