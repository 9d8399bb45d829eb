"""The run's configuration: frozen dataclasses whose fields are flags and whose field docstrings are the help.

Building a config does no I/O. Each class checks its own fields; checks that need two classes are in `RunConfig`.
A field's metadata may carry `flags` (other spellings of its flag) and `choices`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megatron.config.checkpoints import CheckpointConfig
from megatron.config.faults import FaultConfig
from megatron.config.fields import option, require, require_choices

TOKENIZERS = (
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Llama2Tokenizer",
    "TiktokenTokenizer",
    "NullTokenizer",
    "ByteTokenizer",
)
ACTIVATIONS = ("gelu", "relu", "silu", "swiglu", "geglu")
MOE_BACKENDS = ("auto", "reference", "cpu", "grouped_mm", "triton")
DECAY_STYLES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder-only transformer."""

    num_layers: int = 4
    """number of transformer blocks"""
    hidden_size: int = 256
    """width of the residual stream"""
    ffn_hidden_size: int = 0
    """width of a dense feed-forward layer; 0: 4 x hidden size (8/3 of it, rounded up to 64, for swiglu and geglu)"""
    num_attention_heads: int = 4
    """query heads"""
    num_query_groups: int = 0
    """key/value heads for grouped-query attention; 0: as many as query heads"""
    kv_channels: int = 0
    """width of one head; 0: hidden size / heads"""
    seq_length: int = 256
    """tokens in a training sample"""
    max_position_embeddings: int = 0
    """largest position + 1 (the table's length with learned positions); 0: the sequence length"""
    position_embedding_type: str = option("rope", choices=("rope", "learned"))
    """rotary or learned absolute positions"""
    rotary_base: float = 10000.0
    """base of the rotary frequencies"""
    normalization: str = option("RMSNorm", choices=("RMSNorm", "LayerNorm"))
    """kind of normalisation"""
    norm_epsilon: float = option(1e-5, "--layernorm-epsilon")
    """epsilon inside the normalisation"""
    activation: str = option("gelu", choices=ACTIVATIONS)
    """activation of dense layers and experts; swiglu and geglu have a third matrix"""
    swiglu: bool = False
    """the same as --activation swiglu"""
    untie_embeddings_and_output_weights: bool = False
    """give the output layer its own weights"""
    init_method_std: float = 0.02
    """standard deviation of the initial weights; output projections get it divided by sqrt(2 x layers)"""
    attention_dropout: float = 0.0
    """dropout on attention probabilities"""
    hidden_dropout: float = 0.0
    """dropout on the output of attention and feed-forward layers"""
    make_vocab_size_divisible_by: int = 128
    """the vocabulary is padded to a multiple of this"""
    vocab_size: int = 0
    """vocabulary size, the tokenizer's or larger; 0: the tokenizer's"""

    def __post_init__(self):
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "seq_length",
            "make_vocab_size_divisible_by",
        ):
            require(
                getattr(self, name) > 0,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "a positive integer",
            )
        for name in ("rotary_base", "norm_epsilon", "init_method_std"):
            require(
                getattr(self, name) > 0,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "a positive number",
            )
        for name in (
            "ffn_hidden_size",
            "num_query_groups",
            "kv_channels",
            "max_position_embeddings",
            "vocab_size",
        ):
            require(
                getattr(self, name) >= 0,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "0 or more",
            )
        require_choices(self)
        require(
            not self.swiglu or self.activation in ("gelu", "swiglu"),
            "--activation",
            self.activation,
            "only swiglu with --swiglu",
            "Leave one of the two out.",
        )
        heads, groups = self.num_attention_heads, self.query_groups
        require(
            groups > 0 and heads % groups == 0,
            "--num-query-groups",
            groups,
            f"a divisor of the {heads} heads",
        )
        require(
            self.kv_channels > 0 or self.hidden_size % heads == 0,
            "--num-attention-heads",
            heads,
            f"a divisor of the hidden size {self.hidden_size}",
            "Or set --kv-channels.",
        )
        require(
            self.position_embedding_type != "rope" or self.head_size % 2 == 0,
            "--kv-channels",
            self.head_size,
            "an even number with rotary positions",
        )
        require(
            self.max_positions >= self.seq_length,
            "--max-position-embeddings",
            self.max_position_embeddings,
            f"at least the sequence length {self.seq_length}",
        )
        for name in ("attention_dropout", "hidden_dropout"):
            require(
                0 <= getattr(self, name) < 1,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "0 <= p < 1",
            )

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings or self.seq_length

    @property
    def act(self) -> str:
        return "swiglu" if self.swiglu else self.activation

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        gated = self.act in ("swiglu", "geglu")
        return -(-8 * self.hidden_size // 3 // 64) * 64 if gated else 4 * self.hidden_size

    def padded_vocab(self, vocab_size: int) -> int:
        return (
            -(-vocab_size // self.make_vocab_size_divisible_by)
            * self.make_vocab_size_divisible_by
        )


@dataclass(frozen=True)
class MoEConfig:
    """The mixture-of-experts layer around the gate. The gate's own options belong to the gate."""

    num_experts: int = 0
    """routed experts in a mixture-of-experts layer; 0: every layer is dense"""
    expert_interval: int = 1
    """every n-th layer is a mixture: 2 makes layers 2, 4, 6, ... mixtures"""
    moe_layers: tuple[int, ...] = option(())
    """the blocks, from 0, that are mixtures, instead of what --expert-interval and --moe-first-k-dense say"""
    gate: str = "topk"
    """the gate; --help after it also lists that gate's own flags"""
    moe_ffn_hidden_size: int = 0
    """width of one expert; 0: the dense layer's width"""
    moe_train_capacity_factor: float = 0.0
    """rows an expert takes in training, times tokens / experts (not multiplied by k); 0: no limit (dropless)"""
    moe_eval_capacity_factor: float = 0.0
    """the same in evaluation"""
    moe_min_capacity: int = 4
    """smallest capacity of an expert, when there is a limit"""
    moe_shared_experts: int = 0
    """experts that every token visits: one MLP of this many expert widths"""
    moe_first_k_dense: int = 0
    """the first k layers stay dense"""
    moe_expert_parallel_size: int = 1
    """ranks that share one set of experts"""
    moe_backend: str = option("auto", choices=MOE_BACKENDS)
    """what multiplies the experts' rows; auto: cpu on the CPU; triton, grouped_mm or reference on a GPU, whichever of
    them comes first and can be used"""

    def __post_init__(self):
        for name in (
            "num_experts",
            "moe_shared_experts",
            "moe_first_k_dense",
            "moe_train_capacity_factor",
            "moe_eval_capacity_factor",
            "moe_min_capacity",
            "moe_ffn_hidden_size",
        ):
            require(
                getattr(self, name) >= 0,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "0 or more",
            )
        require(
            self.expert_interval > 0,
            "--expert-interval",
            self.expert_interval,
            "a positive integer",
        )
        ep = self.moe_expert_parallel_size
        require(ep > 0, "--moe-expert-parallel-size", ep, "a positive integer")
        require(
            not self.moe_layers or (self.expert_interval == 1 and self.moe_first_k_dense == 0),
            "--moe-layers",
            list(self.moe_layers),
            "only without --expert-interval and --moe-first-k-dense",
            "Use one of the two.",
        )
        require(
            self.num_experts > 0 or ep == 1,
            "--moe-expert-parallel-size",
            ep,
            "1 without experts",
            "Set --num-experts.",
        )
        require(
            self.num_experts > 0 or not self.moe_layers,
            "--moe-layers",
            list(self.moe_layers),
            "only with experts",
            "Set --num-experts.",
        )
        require(
            self.num_experts > 0 or self.moe_shared_experts == 0,
            "--moe-shared-experts",
            self.moe_shared_experts,
            "0 without experts",
            "Set --num-experts.",
        )
        require(
            self.num_experts % ep == 0,
            "--num-experts",
            self.num_experts,
            f"a multiple of --moe-expert-parallel-size, which is {ep}",
            "Each rank holds the same number of experts.",
        )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` (from 0) is a mixture."""
        if self.moe_layers:
            return self.num_experts > 0 and layer in self.moe_layers
        return (
            self.num_experts > 0
            and layer >= self.moe_first_k_dense
            and (layer + 1) % self.expert_interval == 0
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer, and its files."""

    tokenizer_type: str = option("GPT2BPETokenizer", choices=TOKENIZERS)
    """kind of tokenizer"""
    vocab_file: str = ""
    """vocab.json of GPT2BPETokenizer"""
    merge_file: str = ""
    """merges.txt of GPT2BPETokenizer"""
    tokenizer_model: str = ""
    """tokenizer.json or its folder (HuggingFaceTokenizer), .model (SentencePiece, Llama2), .tiktoken (Tiktoken), or
    the vocabulary size (NullTokenizer)"""

    def __post_init__(self):
        require_choices(self)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how samples are cut from them."""

    data_path: tuple[str, ...] = option(())
    """prefixes of .bin/.idx pairs, or weights and prefixes in turn: 0.7 a 0.3 b"""
    train_data_path: tuple[str, ...] = option(())
    """as --data-path, for training only; not with --data-path"""
    valid_data_path: tuple[str, ...] = option(())
    """as --data-path, for validation only"""
    test_data_path: tuple[str, ...] = option(())
    """as --data-path, for the test set only"""
    streaming_data_path: tuple[str, ...] = option(())
    """text to train on, tokenised by processes of their own while the run goes on: .jsonl, .gz, .zst and .parquet
    files, quoted patterns, folders, or hf:NAME for a Hugging Face dataset. Each is one source; they are mixed by their
    size on disk, compressed or not (equally if one is not known), or with weights: 0.7 a.jsonl 0.3 b. The tokens are
    kept in --data-cache-path, for later epochs and runs. Not with --data-path or --train-data-path"""
    streaming_json_key: str = "text"
    """key (column) of the text in --streaming-data-path"""
    streaming_shuffle_samples: int = 1024
    """consecutive samples of a source of --streaming-data-path that are shuffled together, and so tokenised before the
    first step; 1: in the order of the files"""
    split: str = "969,30,1"
    """shares of the documents of --data-path for training, validation, test"""
    data_cache_path: str = ""
    """folder of the sample indices, and of the tokens of --streaming-data-path; empty: index_cache beside the first
    data prefix, stream_cache beside the first source"""
    dataloader_type: str = option("single", choices=("single", "cyclic"))
    """training samples: single cuts and shuffles as many epochs as the run needs and takes each sample once; cyclic
    cuts one epoch and visits its samples again and again, in a new order each time"""
    num_workers: int = 0
    """processes that read data ahead on each rank; 0: read in the training process"""
    reset_position_ids: bool = False
    """start positions again after each end-of-document token"""
    reset_attention_mask: bool = False
    """no attention across an end-of-document token"""
    eod_mask_loss: bool = False
    """no loss on predicting what follows an end-of-document token"""

    def __post_init__(self):
        require_choices(self)
        require(
            not (self.data_path and self.train_data_path),
            "--train-data-path",
            list(self.train_data_path),
            "only without --data-path",
            "Use one of the two.",
        )
        streaming = self.streaming_data_path
        require(
            not (streaming and (self.data_path or self.train_data_path)),
            "--streaming-data-path",
            list(streaming),
            "only without --data-path and --train-data-path",
            "Validation has --valid-data-path.",
        )
        require(
            not streaming or self.dataloader_type == "single",
            "--dataloader-type",
            self.dataloader_type,
            "single with --streaming-data-path",
            "Its order is set by --streaming-shuffle-samples.",
        )
        require(
            self.streaming_shuffle_samples > 0,
            "--streaming-shuffle-samples",
            self.streaming_shuffle_samples,
            "a positive integer",
        )
        require(self.num_workers >= 0, "--num-workers", self.num_workers, "0 or more")

    @property
    def eod_flags(self) -> list[str]:
        """The flags set that need end-of-document tokens in the data."""
        names = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule, precision and ZeRO."""

    lr: float = 3e-4
    """peak learning rate"""
    min_lr: float = 0.0
    """learning rate at the end of the decay"""
    lr_decay_style: str = option("cosine", choices=DECAY_STYLES)
    """shape of the decay; wsd holds the peak and decays over the last --lr-wsd-decay-fraction"""
    lr_warmup_iters: int = 0
    """iterations of linear warm-up"""
    lr_warmup_fraction: float = 0.0
    """linear warm-up as a share of the run"""
    lr_warmup_tokens: int = 0
    """linear warm-up in tokens"""
    lr_decay_iters: int = 0
    """iterations until the minimum; 0: the whole run"""
    lr_decay_tokens: int = 0
    """tokens until the minimum; 0: the whole run"""
    lr_wsd_decay_fraction: float = 0.2
    """share of the run over which wsd decays, at its end"""
    weight_decay: float = 0.1
    """decoupled weight decay; norms, biases, embeddings and router weights have none"""
    adam_beta1: float = 0.9
    """decay of the first moment"""
    adam_beta2: float = 0.95
    """decay of the second moment"""
    adam_eps: float = 1e-8
    """epsilon of Adam"""
    clip_grad: float = 1.0
    """largest global gradient norm; 0: no clipping"""
    bf16: bool = False
    """compute in bfloat16 with fp32 master weights; the router stays in fp32"""
    fp16: bool = False
    """compute in float16 with dynamic loss scaling; the router stays in fp32"""
    zero_stage: int = option(1, choices=(0, 1, 2, 3))
    """DeepSpeed ZeRO stage"""
    deepspeed_config: str = ""
    """JSON file merged into the DeepSpeed configuration; what flags decide may not contradict it"""

    def __post_init__(self):
        require_choices(self)
        for name in ("lr", "adam_eps"):
            require(
                getattr(self, name) > 0,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "a positive number",
            )
        require(
            0 <= self.min_lr <= self.lr,
            "--min-lr",
            self.min_lr,
            f"0 to --lr, which is {self.lr}",
        )
        for name in (
            "lr_warmup_iters",
            "lr_warmup_tokens",
            "lr_decay_iters",
            "lr_decay_tokens",
            "weight_decay",
            "clip_grad",
        ):
            require(
                getattr(self, name) >= 0,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "0 or more",
            )
        for name in ("lr_warmup_fraction", "lr_wsd_decay_fraction"):
            require(
                0 <= getattr(self, name) <= 1,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "0 to 1",
            )
        for name in ("adam_beta1", "adam_beta2"):
            require(
                0 <= getattr(self, name) < 1,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "0 <= beta < 1",
            )
        warmups = [
            n
            for n in ("lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_tokens")
            if getattr(self, n)
        ]
        require(len(warmups) <= 1, "--lr-warmup-*", warmups, "one of iters, fraction, tokens")
        require(
            not (self.lr_decay_iters and self.lr_decay_tokens),
            "--lr-decay-tokens",
            self.lr_decay_tokens,
            "only without --lr-decay-iters",
            "Use one of the two.",
        )
        require(
            not (self.bf16 and self.fp16),
            "--fp16",
            True,
            "only without --bf16",
            "Use one of the two.",
        )

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True)
class TrainConfig(CheckpointConfig, FaultConfig):
    """The loop: how long, how much at once, and what is written when."""

    micro_batch_size: int = 4
    """samples of one forward on one rank"""
    global_batch_size: int = 0
    """samples of one optimizer step over all ranks; 0: micro-batch x ranks"""
    train_iters: int = 0
    """optimizer steps; this or --train-tokens"""
    train_tokens: int = 0
    """tokens to train on; this or --train-iters"""
    seed: int = 1234
    """seed of weights, data order and dropout"""
    eval_interval: int = 1000
    """steps between evaluations on the validation split; 0: only at the start and the end"""
    eval_iters: int = 10
    """batches of the global batch size in one evaluation; 0: no evaluation"""
    log_interval: int = 10
    """steps between log lines"""
    recompute_activations: bool = False
    """keep only block inputs and run blocks again in the backward pass"""
    tensorboard_dir: str = ""
    """folder for TensorBoard scalars"""
    metrics_file: str = ""
    """metrics.jsonl to append to; empty: beside the checkpoints when --save is given"""
    wandb_project: str = ""
    """Weights & Biases project; needs the wandb extra"""
    wandb_exp_name: str = ""
    """name of the run there"""
    profile: bool = False
    """profile some iterations: a Chrome trace, and a table of where a step's time goes"""
    profile_step_start: int = 10
    """iterations that are done when profiling starts"""
    profile_step_end: int = 12
    """iterations that are done when profiling ends"""
    profile_ranks: tuple[int, ...] = option((0,))
    """ranks that are profiled"""
    profile_dir: str = ""
    """folder of traces and tables; empty: profile in the folder of --save, else in that of --tensorboard-dir, else
    here"""

    def __post_init__(self):
        require(
            self.micro_batch_size > 0,
            "--micro-batch-size",
            self.micro_batch_size,
            "a positive integer",
        )
        require(
            self.log_interval > 0, "--log-interval", self.log_interval, "a positive integer"
        )
        for name in (
            "global_batch_size",
            "train_iters",
            "train_tokens",
            "eval_interval",
            "eval_iters",
        ):
            require(
                getattr(self, name) >= 0,
                f"--{name.replace('_', '-')}",
                getattr(self, name),
                "0 or more",
            )
        require(
            not (self.train_iters and self.train_tokens),
            "--train-tokens",
            self.train_tokens,
            "only without --train-iters",
            "Use one of the two.",
        )
        self.check_checkpoints()
        self.check_faults()
        require(
            self.profile_step_start >= 0,
            "--profile-step-start",
            self.profile_step_start,
            "0 or more",
        )
        require(
            self.profile_step_end > self.profile_step_start,
            "--profile-step-end",
            self.profile_step_end,
            f"more than --profile-step-start, which is {self.profile_step_start}",
        )
        require(
            len(self.profile_ranks) > 0 and min(self.profile_ranks) >= 0,
            "--profile-ranks",
            list(self.profile_ranks),
            "one rank or more, each 0 or more",
        )

    def global_batch(self, world_size: int) -> int:
        """Samples per optimizer step.

        Raises:
            ValueError: the global batch is not a multiple of micro-batch x ranks.
        """
        size = self.global_batch_size or self.micro_batch_size * world_size
        require(
            size % (self.micro_batch_size * world_size) == 0,
            "--global-batch-size",
            size,
            f"a multiple of --micro-batch-size {self.micro_batch_size} x {world_size} ranks",
        )
        return size

    def iterations(self, seq_length: int, world_size: int) -> int:
        """Optimizer steps of the whole run."""
        require(
            bool(self.train_iters or self.train_tokens),
            "--train-iters",
            0,
            "a positive integer",
            "Or set --train-tokens.",
        )
        return self.train_iters or -(
            -self.train_tokens // (self.global_batch(world_size) * seq_length)
        )


@dataclass(frozen=True)
class RunConfig:
    """Everything a run was told. `gate_options` is the chosen gate's own Config, as a plain dict."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    gate_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        stage, moe, layers = self.optimizer.zero_stage, self.moe, self.model.num_layers
        require(
            stage > 0 or moe.num_experts == 0,
            "--zero-stage",
            stage,
            "1, 2 or 3 with experts",
            "DeepSpeed's ZeRO 0 gets the gradient norm of experts wrong, so clipping would be wrong.",
        )
        require(
            all(0 <= i < layers for i in moe.moe_layers),
            "--moe-layers",
            list(moe.moe_layers),
            f"blocks from 0 to {layers - 1}",
        )
        require(
            moe.num_experts == 0 or any(moe.is_moe_layer(i) for i in range(layers)),
            "--expert-interval",
            moe.expert_interval,
            f"what leaves a mixture layer among {layers} layers, the first "
            f"{moe.moe_first_k_dense} dense",
            "Lower it or --moe-first-k-dense.",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as written to run.json."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "moe": MoEConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
}
