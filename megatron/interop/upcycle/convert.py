"""Make an MoE model from a dense one, layer by layer.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.consolidate import check_output, find_verified_checkpoint
from megatron.checkpoint.manifest import HF_FOLDER, copy_with_digest
from megatron.checkpoint.weights_only import require_no_checkpoints
from megatron.config.schema import RunConfig
from megatron.config.tokenizer import TokenizerConfig
from megatron.interop.hf.convert import write_converted_checkpoint
from megatron.interop.hf.export import ExportOptions, convert_to_hf
from megatron.interop.hf.hf_folder import files_to_copy
from megatron.interop.model_specs import build_meta_model
from megatron.interop.upcycle.dense_ffn import FFNStatistics
from megatron.interop.upcycle.dense_source import DenseSource, build_dense_model
from megatron.interop.upcycle.flags import UpcycleRequest
from megatron.interop.upcycle.gates import StartWeights
from megatron.interop.upcycle.sample_text import read_sample
from megatron.interop.upcycle.scale import set_scales
from megatron.interop.upcycle.statistics import add_importance, collect_activity
from megatron.interop.upcycle.weights import UpcycledWeights
from megatron.io.progress import ProgressCallback, no_progress
from megatron.io.sha256 import FileDigest
from megatron.log import get_logger
from megatron.model.builder import size_table
from megatron.model.parameter_count import ParameterCount, count_parameters


@dataclass(frozen=True)
class UpcycleResult:
    """What was written."""

    path: Path
    """directory of the checkpoint, or the Hugging Face folder"""
    config: RunConfig
    dense_size: ParameterCount
    moe_size: ParameterCount
    table: str
    """sizes of the MoE model by part"""
    start: Mapping[str, StartWeights]
    """sum of the weights of a token's experts by gate"""
    description: str
    """what the result computes before it is trained"""


def prepare_weights(source: DenseSource, request: UpcycleRequest) -> UpcycledWeights:
    """Return the tensors of the MoE model, which are computed when they are read.

    If the options need statistics of the dense model, it is built and runs on a sample of text.

    Raises:
        ValueError: the sample of text cannot be used, or a gate does not fit the options.
    """
    model = build_meta_model(request.config, source.vocab_size)
    scaled = set_scales(request, model)
    request = scaled.request
    model = build_meta_model(request.config, source.vocab_size)
    statistics = {}
    if request.options.sample_data:
        statistics = _statistics(source, request)
    return UpcycledWeights(request, model, source.read, scaled.weight_scales, statistics)


def _statistics(source: DenseSource, request: UpcycleRequest) -> dict[int, FFNStatistics]:
    options = request.options
    length = request.config.model.seq_length
    sequences = read_sample(
        options.sample_data, source.tokenizer, options.sample_tokens, length
    )
    num_tokens = sum(len(tokens) - 1 for tokens in sequences)
    get_logger().info(
        "running the dense model on %d tokens of %s", num_tokens, options.sample_data
    )
    model = build_dense_model(source)
    found = collect_activity(model, sequences, request.moe_layers, options.active_fraction)
    if options.strategy != "gradient":
        return found
    num_experts = request.config.moe.num_experts
    seed = request.config.train.seed
    return add_importance(model, sequences, found, num_experts, seed)


def upcycle(
    source: DenseSource,
    request: UpcycleRequest,
    output: str | Path,
    progress: ProgressCallback = no_progress,
    planned: ProgressCallback = no_progress,
) -> UpcycleResult:
    """Write the MoE model to a new directory of checkpoints, or as a Hugging Face folder.

    Args:
        progress: called with the bytes that were written since the last call.
        planned: called once before, with the bytes that will be written.
    Raises:
        ValueError: the output exists, or as `prepare_weights`.
        OSError: a file cannot be read or written, or the disk is too full.
    """
    output = Path(output).resolve()
    is_hf = request.options.output_format == "hf"
    check = check_output if is_hf else require_no_checkpoints
    check(output)
    weights = prepare_weights(source, request)
    start = weights.start_weights()
    if is_hf:
        path = _write_hf(source, weights, output, progress, planned)
    else:
        path = _write_checkpoint(source, weights, output, progress, planned)
    dense = build_meta_model(source.config, source.vocab_size)
    return UpcycleResult(
        path,
        weights.request.config,
        count_parameters(dense),
        count_parameters(weights.model),
        size_table(weights.model),
        start,
        describe_start(weights.request, start),
    )


def _write_checkpoint(
    source: DenseSource,
    weights: UpcycledWeights,
    output: Path,
    progress: ProgressCallback,
    planned: ProgressCallback,
) -> Path:
    """Write a directory of checkpoints with one of iteration 0; return the checkpoint."""
    config = weights.request.config
    names: list[str] = []
    tokenizer_source = None
    if source.hf_folder is not None:
        names = files_to_copy(source.hf_folder)
        if _has_files_in(config.tokenizer, source.hf_folder):
            tokenizer_source = source.hf_folder

    def copy_files(partial: Path) -> dict[str, FileDigest]:
        digests = {}
        if names:
            (partial / HF_FOLDER).mkdir()
        for name in names:
            path = f"{HF_FOLDER}/{name}"
            digests[path] = copy_with_digest(source.hf_folder / name, partial / path)
        return digests

    tensors = weights.source()
    planned(tensors.nbytes)
    return write_converted_checkpoint(
        output,
        config,
        source.tokenizer,
        tensors,
        tokenizer_source=tokenizer_source,
        extra_files=copy_files,
        extra_bytes=sum((source.hf_folder / name).stat().st_size for name in names),
        progress=progress,
    )


def _has_files_in(tokenizer: TokenizerConfig, folder: Path) -> bool:
    """Return whether the files of a tokenizer are in a folder."""
    paths = (tokenizer.tokenizer_model, tokenizer.vocab_file, tokenizer.merge_file)
    files = [Path(path) for path in paths if path and Path(path).is_file()]
    return any(file.resolve().parent == folder.resolve() for file in files)


def _write_hf(
    source: DenseSource,
    weights: UpcycledWeights,
    output: Path,
    progress: ProgressCallback,
    planned: ProgressCallback,
) -> Path:
    """Write a Hugging Face folder by way of a checkpoint of ours on the same disk."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as folder:
        path = _write_checkpoint(source, weights, Path(folder) / "moe", progress, planned)
        checkpoint = find_verified_checkpoint(path)
        result = convert_to_hf(checkpoint, output, ExportOptions(), progress, planned)
    get_logger().info("%s is a Hugging Face folder of the family %s", output, result.family)
    return output


def describe_start(request: UpcycleRequest, start: Mapping[str, StartWeights]) -> str:
    """Return what the MoE layers compute before they are trained, as one sentence."""
    options = request.options
    changes = []
    if options.noise_std:
        changes.append("their noise")
    if options.drop_ratio:
        changes.append("the neurons that were drawn again")
    if all(weights.are_one for weights in start.values()):
        if changes:
            return f"the MoE layers differ from the dense ones by {' and '.join(changes)}"
        return "the MoE layers compute what the dense ones do"
    ranges = []
    for name, weights in start.items():
        ranges.append(f"{weights.lowest:.4g} to {weights.highest:.4g} with gate {name}")
    return (
        "the MoE layers approximate the dense ones: a slice of a dense layer has the weight "
        f"{', '.join(ranges)} instead of 1"
    )
