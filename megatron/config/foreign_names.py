"""Flags of Megatron-LM and Megatron-DeepSpeed that have another name here, or none.

`translate` replaces other names, drops flags that are not needed with one warning, and refuses
those that are not supported. A flag that would change what a run computes is never dropped.
docs/megatron-names.md lists the tables, and a test compares it with them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from megatron.config.fields import require

ALIASES = {
    "--checkpoint-activations": "--recompute-activations",
    "--ckpt-step": "--load-step",
    "--distributed-timeout-minutes": "--timeout-minutes",
    "--encoder-num-layers": "--num-layers",
    "--encoder-seq-length": "--seq-length",
    "--expert-model-parallel-size": "--moe-expert-parallel-size",
    "--moe-apply-probs-on-input": "--moe-weight-on-input",
    "--moe-aux-loss-coeff": "--moe-loss-coeff",
    "--moe-input-jitter-eps": "--jitter",
    "--moe-router-bias-update-rate": "--bias-update-speed",
    "--moe-router-group-topk": "--topk-group",
    "--moe-router-num-groups": "--n-group",
    "--moe-router-topk": "--topk",
    "--moe-router-topk-scaling-factor": "--routed-scaling-factor",
    "--mscale": "--yarn-mscale",
    "--mscale-all-dim": "--yarn-mscale-all-dim",
    "--multi-latent-attention": "--attention=mla",
    "--num-key-value-heads": "--num-query-groups",
    "--override-lr-scheduler": "--override-lr-schedule",
    "--override-opt-param-scheduler": "--override-lr-schedule",
    "--qk-head-dim": "--qk-nope-head-dim",
    "--qk-pos-emb-head-dim": "--qk-rope-head-dim",
    "--qk-layernorm": "--qk-norm=head",
    "--rotary-scaling-factor": "--rope-scaling-factor",
    "--use-rope-scaling": "--rope-scaling=llama3",
    "--use-rotary-position-embeddings": "--position-embedding-type=rope",
}
"""Other names of our flags; a value after `=` belongs to the name"""


@dataclass(frozen=True)
class NotNeeded:
    """A flag that can be left out."""

    reason: str
    values: tuple[str, ...] = ()
    """values at which it can be left out; ANY for all; empty: it has no value"""


ANY = ("*",)
_SDPA = "PyTorch's scaled_dot_product_attention chooses flash kernels by itself"
_FUSED = "it selects kernels, and there are no such kernels"
_NO_TP = "there is no tensor parallelism"
_NO_PP = "there is no pipeline parallelism"
_FORMAT = "there is one checkpoint format, which loads on any number of ranks"
_LOGGED = "it is always logged"
_GROUPED = "all experts of a rank are always computed together"
_ZERO = "DeepSpeed overlaps communication; see --deepspeed-config"

NOT_NEEDED = {
    "--accumulate-allreduce-grads-in-fp32": NotNeeded(
        "gradients are reduced in fp32 without --grad-reduce-in-bf16"
    ),
    "--attention-backend": NotNeeded(_SDPA, ANY),
    "--attention-softmax-in-fp32": NotNeeded("SDPA computes the softmax in fp32"),
    "--auto-detect-ckpt-format": NotNeeded(_FORMAT),
    "--calculate-per-token-loss": NotNeeded("the loss is always a mean over target tokens"),
    "--ckpt-format": NotNeeded(_FORMAT, ANY),
    "--context-parallel-size": NotNeeded("there is no context parallelism", ("1",)),
    "--create-moe-param-group": NotNeeded("experts always have a parameter group"),
    "--data-impl": NotNeeded("token files are always memory-mapped", ("mmap", "infer")),
    "--deepspeed-activation-checkpointing": NotNeeded(
        "--recompute-activations does not depend on DeepSpeed"
    ),
    "--disable-bias-linear": NotNeeded("linear layers have no biases unless set"),
    "--dist-ckpt-format": NotNeeded(_FORMAT, ANY),
    "--distributed-backend": NotNeeded("the device decides: NCCL or gloo", ("nccl", "gloo")),
    "--ds-sequence-parallel-size": NotNeeded("there is no sequence parallelism", ("1",)),
    "--exit-on-missing-checkpoint": NotNeeded(
        "without --load-or-init a missing checkpoint is an error"
    ),
    "--exit-signal-handler": NotNeeded("SIGTERM always saves and stops"),
    "--expert-tensor-parallel-size": NotNeeded(_NO_TP, ("1",)),
    "--log-throughput": NotNeeded(_LOGGED),
    "--log-validation-ppl-to-tensorboard": NotNeeded(_LOGGED),
    "--mlp-type": NotNeeded("it is the only kind of MoE layer", ("standard",)),
    "--mmap-warmup": NotNeeded("token files need no warm-up"),
    "--moe-grouped-gemm": NotNeeded(_GROUPED),
    "--moe-pad-expert-input-to-capacity": NotNeeded("rows need no padding"),
    "--moe-per-layer-logging": NotNeeded(_LOGGED),
    "--moe-permute-fusion": NotNeeded("the backend decides; see --moe-backend"),
    "--moe-router-dtype": NotNeeded("routers compute in fp32", ("fp32",)),
    "--moe-router-fusion": NotNeeded(_FUSED),
    "--moe-router-pre-softmax": NotNeeded("gates apply the softmax before they select"),
    "--moe-shared-expert-overlap": NotNeeded("shared experts always overlap"),
    "--moe-token-dispatcher-type": NotNeeded("sharded experts use an all-to-all", ANY),
    "--moe-token-drop-policy": NotNeeded("a capacity keeps the largest weights", ("probs",)),
    "--moe-use-legacy-grouped-gemm": NotNeeded(_GROUPED),
    "--no-async-tensor-model-parallel-allreduce": NotNeeded(_NO_TP),
    "--no-bias-dropout-fusion": NotNeeded(_FUSED),
    "--no-bias-gelu-fusion": NotNeeded(_FUSED),
    "--no-bias-swiglu-fusion": NotNeeded(_FUSED),
    "--no-create-attention-mask-in-dataloader": NotNeeded("no mask is made unless needed"),
    "--no-gradient-accumulation-fusion": NotNeeded(_FUSED),
    "--no-masked-softmax-fusion": NotNeeded(_FUSED),
    "--no-persist-layer-norm": NotNeeded(_FUSED),
    "--no-pipeline-parallel": NotNeeded(_NO_PP),
    "--no-query-key-layer-scaling": NotNeeded("queries and keys are never scaled by layer"),
    "--no-rope-fusion": NotNeeded(_FUSED),
    "--optimizer": NotNeeded("the optimizer is AdamW", ("adam",)),
    "--overlap-grad-reduce": NotNeeded(_ZERO),
    "--overlap-param-gather": NotNeeded(_ZERO),
    "--pipeline-model-parallel-size": NotNeeded(_NO_PP, ("1",)),
    "--sequence-parallel": NotNeeded("it belongs to tensor parallelism, which there is not"),
    "--tensor-model-parallel-size": NotNeeded(_NO_TP, ("1",)),
    "--transformer-impl": NotNeeded("there is one implementation", ANY),
    "--universal-checkpoint": NotNeeded(_FORMAT),
    "--use-cpu-initialization": NotNeeded("weights are always initialised on the CPU"),
    "--use-dist-ckpt": NotNeeded(_FORMAT),
    "--use-distributed-optimizer": NotNeeded("ZeRO shards the optimizer; see --zero-stage"),
    "--use-flash-attn": NotNeeded(_SDPA),
    "--use-flash-attn-triton": NotNeeded(_SDPA),
    "--use-flash-attn-v1": NotNeeded(_SDPA),
    "--use-flash-attn-v2": NotNeeded(_SDPA),
    "--use-mcore-models": NotNeeded("there is one implementation"),
    "--use-pytorch-profiler": NotNeeded("--profile always uses it"),
    "--use-tutel": NotNeeded("it selects kernels; see --moe-backend"),
}
"""Flags without an effect on what a run computes: dropped, with a warning"""

_DEEPSPEED_FILE = "set it in the file of --deepspeed-config"
_RECOMPUTE = "use --recompute-activations, which recomputes every block"
_UPCYCLING = "make the first checkpoint with tools/upcycle.py, and give it to --load"

NOT_SUPPORTED = {
    "--apply-layernorm-1p": "choose --normalization RMSNorm or LayerNorm",
    "--apply-residual-connection-post-layernorm": "blocks are pre-norm",
    "--checkpoint-num-layers": _RECOMPUTE,
    "--cpu-optimizer": _DEEPSPEED_FILE,
    "--curriculum-learning": "leave it out",
    "--decoupled-lr": "all parameters have the learning rate --lr",
    "--disable-moe-token-dropping": "use --moe-train-capacity-factor 0, the default",
    "--embed-layernorm": "leave it out",
    "--enable-expert-tensor-parallelism": _NO_TP,
    "--end-weight-decay": "use --weight-decay, which is constant",
    "--fp8-format": "use --bf16",
    "--group-query-attention": "leave it out; --num-query-groups is enough",
    "--hysteresis": _DEEPSPEED_FILE,
    "--init-method-xavier-uniform": "use --init-method-std",
    "--initial-loss-scale": _DEEPSPEED_FILE,
    "--loss-scale": _DEEPSPEED_FILE,
    "--loss-scale-window": _DEEPSPEED_FILE,
    "--lr-warmup-init": "the warm-up starts from 0",
    "--lr-wsd-decay-iters": "use --lr-wsd-decay-fraction",
    "--lr-wsd-decay-samples": "use --lr-wsd-decay-fraction",
    "--min-loss-scale": _DEEPSPEED_FILE,
    "--moe-expert-capacity-factor": (
        "use --moe-train-capacity-factor and --moe-eval-capacity-factor, each with the same value, "
        "and --moe-min-capacity 0"
    ),
    "--moe-layer-freq": "use --expert-interval, --moe-layers or a list for --gate",
    "--moe-layer-recompute": _RECOMPUTE,
    "--moe-router-enable-expert-bias": "use --bias-rule sign",
    "--moe-router-load-balancing-type": "choose a --gate, and set --moe-loss-coeff",
    "--moe-router-score-function": "use --score-function",
    "--moe-upcycling-granularity": _UPCYCLING,
    "--moe-use-upcycling": _UPCYCLING,
    "--mtp-num-layers": "leave it out",
    "--no-position-embedding": "choose --position-embedding-type rope or learned",
    "--num-layers-per-virtual-pipeline-stage": _NO_PP,
    "--partition-activations": _NO_TP,
    "--recompute-granularity": _RECOMPUTE,
    "--recompute-method": _RECOMPUTE,
    "--recompute-num-layers": _RECOMPUTE,
    "--rotary-seq-len-interpolation-factor": "use --rope-scaling linear and --rope-scaling-factor",
    "--squared-relu": "choose an --activation",
    "--start-weight-decay": "use --weight-decay, which is constant",
    "--train-weighted-split-paths": "use --train-data-path with weights",
    "--use-checkpoint-opt-param-scheduler": (
        "set the checkpoint's schedule, which a resumed run must have"
    ),
    "--vocab-extra-ids": "use --vocab-size",
    "--window-attn-skip-freq": "use --window-layers",
    "--zero-reduce-bucket-size": _DEEPSPEED_FILE,
}
"""Flags that would change a run, each with what to do instead"""


def translate(
    words: list[str], known: Collection[str], warn: Callable[[str, str], None]
) -> list[str]:
    """Replace the flags of Megatron in a command line by ours.

    Args:
        words: the command line, with hyphens in flags.
        known: our flags, which take precedence over the tables.
        warn: receives a message with one %s and what replaces it.

    Raises:
        ValueError: a flag is not supported, or not at this value.
    """
    translated = []
    dropped = {}
    values_left = 0
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if values_left:
            values_left -= 1  # the value of a dropped flag
        elif name in known:
            translated.append(word)
        elif name in ALIASES:
            translated.append(ALIASES[name] + equals + value)
        elif name in NOT_NEEDED:
            if NOT_NEEDED[name].values and not equals:
                value = "".join(words[i + 1 : i + 2])
                values_left = 1
            _check_value(name, value)
            dropped[name] = NOT_NEEDED[name].reason
        elif name in NOT_SUPPORTED:
            raise ValueError(f"{name} is not supported here: {NOT_SUPPORTED[name]}")
        else:
            translated.append(word)
    if dropped:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in dropped.items())
        warn("flags of Megatron that are not needed and can be left out: %s", reasons)
    return translated


def _check_value(name: str, value: str) -> None:
    """Check that a flag can be left out at this value."""
    flag = NOT_NEEDED[name]
    if flag.values == ANY:
        require(
            value and not value.startswith("--"), name, value, "a value", "Or leave it out."
        )
    else:
        allowed = flag.values or ("",)
        advice = f"Leave it out: {flag.reason}."
        require(value in allowed, name, value, " ".join(allowed) or "no value", advice)
