"""Initialization shared by the programs that run a model: training and text generation.

Process groups, tokenizer, checkpoint and model are built here and nowhere else, and passed on
in one record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.fields import require
from megatron.config.schema import CheckpointConfig, RunConfig, TokenizerConfig
from megatron.data.data_args import read_data_args
from megatron.io.open_files import raise_open_files_limit
from megatron.log import get_logger
from megatron.parallel.groups import Groups, broadcast_from_rank0
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer
from megatron.training.startup_timer import StartupTimer

if TYPE_CHECKING:
    from megatron.checkpoint.loader import LoadedCheckpoint
    from megatron.checkpoint.metadata import TrainingProgress
    from megatron.engine.engine import Engine
    from megatron.model.gpt import GPT


@dataclass(frozen=True)
class Run:
    """What a program has before it builds a model."""

    config: RunConfig
    """the flags, completed by the checkpoint (such as its global batch size)"""
    groups: Groups
    tokenizer: Tokenizer
    vocab_size: int
    """of the model, before padding: the tokenizer's or a larger --vocab-size"""
    checkpoint: LoadedCheckpoint | None
    """the checkpoint that the run starts from"""
    progress: TrainingProgress
    """how far the run is: at the start, or where the checkpoint was saved"""
    hf_folder: str = ""
    """folder of the Hugging Face model whose weights the run starts from; empty: none"""


def initialize_training(config: RunConfig, timer: StartupTimer) -> Run:
    """Start process groups, and find the tokenizer and the checkpoint to start from.

    Args:
        timer: its stages "tokenizer" and "DeepSpeed and process groups" end here.

    Raises:
        ValueError: a flag does not fit the ranks, the tokenizer or the checkpoint.
        OSError: a file is missing, or the ranks do not find each other.
    """
    _check_output_paths(config)
    raise_open_files_limit()
    config = replace(config, tokenizer=_tokenizer_of_mock_data(config))
    tokenizer = build_tokenizer(config.tokenizer)
    timer.mark("tokenizer")
    groups = _init_distributed(
        config.moe.moe_expert_parallel_size, config.fault_tolerance.timeout_minutes
    )
    from megatron.checkpoint.gate_code import require_same_gates_on_ranks
    from megatron.checkpoint.loader import load_for_run

    timer.mark("DeepSpeed and process groups")
    require_same_gates_on_ranks(config, groups)
    data = broadcast_from_rank0(lambda: read_data_args(config.data), groups)
    config = replace(config, data=data)
    log_expert_backend(config, groups)
    checkpoint, config, progress = load_for_run(config, groups)
    vocab_size = _vocab_size(config, tokenizer)
    hf_folder = ""
    if checkpoint is None:
        hf_folder = config.checkpoint.init_from_hf
    return Run(config, groups, tokenizer, vocab_size, checkpoint, progress, hf_folder)


def initialize_inference(
    load: str, load_step: int = 0, eval_capacity_factor: float = 0.0
) -> Run:
    """Start process groups, and take everything else from a checkpoint or a Hugging Face folder.

    Experts are sharded as in training if that fits the number of ranks, otherwise every rank
    holds all of them. The capacity factors of training do not apply: under a capacity, the
    other prompts of a batch would decide which experts a token gets.

    Args:
        load: folder of checkpoints, one checkpoint, or a Hugging Face model.
        load_step: iteration of the checkpoint; 0: the newest.
        eval_capacity_factor: capacity factor of the MoE layers; 0 is dropless.

    Raises:
        ValueError: the capacity factor is negative or not finite, or the checkpoint has no
            experts for it, does not fit the tokenizer that its flags name, or has a gate that
            is not imported; the Hugging Face model is not valid, or a step of it is requested.
        OSError: there is no valid checkpoint.
    """
    require(
        0 <= eval_capacity_factor < math.inf,
        "--moe-eval-capacity-factor",
        eval_capacity_factor,
        "a finite number, 0 or more",
    )
    from megatron.checkpoint.directory import is_hf_folder
    from megatron.checkpoint.gate_code import require_same_gates_on_ranks
    from megatron.checkpoint.loader import find_checkpoint
    from megatron.checkpoint.metadata import RunMetadata

    groups = _init_distributed(1)
    if is_hf_folder(load):
        return _initialize_hf_inference(load, load_step, eval_capacity_factor, groups)

    options = CheckpointConfig(load=load, load_step=load_step, finetune=True)
    checkpoint = find_checkpoint(options, groups, required=True)
    config = checkpoint.metadata.config
    require_same_gates_on_ranks(config, groups)
    ep_size = config.moe.moe_expert_parallel_size
    if groups.world_size % ep_size:
        ep_size = 1
    groups = _init_distributed(ep_size)
    tokenizer = build_tokenizer(config.tokenizer)
    checkpoint.check(RunMetadata.of(config, groups, tokenizer))
    config = _with_inference_settings(config, eval_capacity_factor)
    vocab_size = _vocab_size(config, tokenizer)
    return Run(config, groups, tokenizer, vocab_size, checkpoint, checkpoint.progress)


def _initialize_hf_inference(
    folder: str, load_step: int, eval_capacity_factor: float, groups: Groups
) -> Run:
    """As `initialize_inference`, from a Hugging Face folder."""
    from megatron.checkpoint.gate_code import require_same_gates_on_ranks
    from megatron.checkpoint.metadata import TrainingProgress
    from megatron.interop.hf.convert import open_hf_model

    require(
        load_step == 0,
        "--load-step",
        load_step,
        "0 for a Hugging Face model",
        "Leave it out.",
    )
    model = broadcast_from_rank0(lambda: open_hf_model(folder).config, groups)
    require_same_gates_on_ranks(model, groups)
    config = _with_inference_settings(model, eval_capacity_factor)
    if config.moe.num_experts % groups.world_size == 0:
        groups = _init_distributed(groups.world_size)
    tokenizer = build_tokenizer(config.tokenizer)
    vocab_size = _vocab_size(config, tokenizer)
    progress = TrainingProgress()
    return Run(config, groups, tokenizer, vocab_size, None, progress, folder)


def _with_inference_settings(config: RunConfig, eval_capacity_factor: float) -> RunConfig:
    """Return a configuration whose experts run here, with this capacity factor."""
    # The backend of training need not exist on this machine.
    moe = replace(config.moe, moe_eval_capacity_factor=eval_capacity_factor, moe_backend="auto")
    require(
        not eval_capacity_factor or moe.num_experts > 0,
        "--moe-eval-capacity-factor",
        eval_capacity_factor,
        "0 for a model without experts",
        "Leave it out.",
    )
    return replace(config, moe=moe)


def build_run_model(run: Run) -> GPT:
    """Build the model of a run, with the weights of its checkpoint or Hugging Face folder, if any.

    Raises:
        ValueError: the gate refuses its options, or the checkpoint or folder holds another model.
    """
    model = _build_model(run)
    if run.checkpoint is not None:
        run.checkpoint.load_weights(model, run.groups)
    elif run.hf_folder:
        from megatron.interop.hf.initial_weights import load_hf_weights

        load_hf_weights(model, run.groups, run.hf_folder)
    return model


def build_inference_model(run: Run) -> GPT:
    """Build the model of an inference run on this rank's device, in the dtypes of training.

    There is no engine and no optimizer, and nothing of `--deepspeed_config` is read: every rank
    holds all weights but the experts of other ranks.

    Raises:
        ValueError: the checkpoint holds another model than its configuration describes.
    """
    from megatron.inference.model import cast_for_inference
    from megatron.model.meta_device import meta_device

    checkpoint = run.checkpoint
    if checkpoint is not None:
        checkpoint.check_sizes()
        with meta_device():
            shapes_only = _build_model(run)
        # Before any memory is allocated: the configuration is as trustworthy as its origin.
        checkpoint.check_model(shapes_only, run.groups)
    model = build_run_model(run)
    return cast_for_inference(model, run.config.optimizer.precision, run.groups.device)


def _build_model(run: Run) -> GPT:
    from megatron.model.builder import build_run_config_model

    return build_run_config_model(run.config, run.vocab_size, run.groups)


def build_engine(run: Run, model: GPT) -> Engine:
    """Give a model to the engine. Its weights must be loaded: the engine copies them."""
    from megatron.engine.engine import Engine

    config = run.config
    return Engine(
        model,
        config.optimizer,
        config.deepspeed,
        config.train,
        run.groups,
        evaluation_only=config.train.skip_train,
        routing_metrics=config.logging.routing_metrics,
    )


def restore_training_state(run: Run, engine: Engine) -> None:
    """Seed this rank's random streams and restore the optimizer's and random state."""
    from megatron.parallel import rng

    rng.seed_rank(run.config.train.seed, run.groups.rank)
    if run.checkpoint is not None:
        run.checkpoint.restore(engine, run.groups)


def _init_distributed(ep_size: int, timeout_minutes: float = 10.0) -> Groups:
    """Start process groups: before any other module that imports DeepSpeed."""
    from megatron.engine import distributed

    return distributed.init_distributed(ep_size, timeout_minutes)


def _check_output_paths(config: RunConfig) -> None:
    """Check that no file has the path of a directory that the run writes, nor the reverse.

    Raises:
        ValueError: one does; the message names the flag.
    """
    paths = {
        "--save": config.checkpoint.save,
        "--tensorboard-dir": config.logging.tensorboard_dir,
        "--wandb-save-dir": config.logging.wandb_save_dir,
        "--profile-dir": config.profiling.profile_dir,
        "--data-cache-path": config.data.data_cache_path,
    }
    for flag, value in paths.items():
        found = [path for path in (Path(value), *Path(value).parents) if path.exists()]
        require(
            not value or found[0].is_dir(),
            flag,
            value,
            "the path of a directory, which is made if it is missing",
            f"{found[0]} is a file.",
        )
    metrics_file = config.logging.metrics_file
    require(
        not metrics_file or not Path(metrics_file).is_dir(),
        "--metrics-file",
        metrics_file,
        "the path of a file",
        f"{metrics_file} is a directory.",
    )


def _tokenizer_of_mock_data(config: RunConfig) -> TokenizerConfig:
    """Return a tokenizer without files for --mock-data if no files are named."""
    if not (config.data.mock_data and config.tokenizer.lacks_files):
        return config.tokenizer
    # The end-of-document id of a NullTokenizer follows its ordinary ids.
    ordinary_ids = config.model.vocab_size - 1
    get_logger().info(
        "--mock-data: the tokenizer is NullTokenizer with %d ids, as --vocab-size sets",
        config.model.vocab_size,
    )
    return TokenizerConfig("NullTokenizer", tokenizer_model=str(ordinary_ids))


def _vocab_size(config: RunConfig, tokenizer: Tokenizer) -> int:
    size = config.model.vocab_size or tokenizer.vocab_size
    require(
        size >= tokenizer.vocab_size,
        "--vocab-size",
        size,
        f"at least the tokenizer's {tokenizer.vocab_size}",
        "Or leave it out.",
    )
    return size


def log_expert_backend(config: RunConfig, groups: Groups) -> None:
    """Log which backend runs the experts and why.

    Raises:
        ValueError: the backend that --moe-backend names cannot run here; nothing has been
            built yet.
    """
    from megatron.model.builder import choose_moe_backend
    from megatron.moe.experts.backends import COMPUTE_DTYPES

    if not config.moe.num_experts:
        return
    dtype = COMPUTE_DTYPES[config.optimizer.precision]
    backend, reason = choose_moe_backend(config.model, config.moe, groups.device, dtype)
    get_logger().info("experts run on the %s backend: %s", backend, reason)
