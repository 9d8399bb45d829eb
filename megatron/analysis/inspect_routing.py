"""What tools/inspect_routing.py does: get a trace from a model or a file, and write it as asked."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.analysis.record_texts import encode_texts, record_texts, token_texts
from megatron.analysis.routing_page import write_routing_page
from megatron.analysis.routing_page_data import PageOptions
from megatron.config.fields import require
from megatron.initialize import Run, build_inference_model, initialize_inference
from megatron.interop.model_identity import checkpoint_identity, hf_identity
from megatron.io.untrusted import read_text_file
from megatron.log import is_rank0
from megatron.moe.routing_trace import RoutingTrace
from megatron.moe.routing_trace_file import read_routing_trace, write_routing_trace
from megatron.parallel.groups import broadcast_from_rank0
from megatron.tokenizer.base import Tokenizer

DEFAULT_MAX_TOKENS = 16384
_LARGEST_FILE = 1 << 28
"""Bytes of a text file"""


@dataclass(frozen=True)
class InspectionInputs:
    """Where the routing comes from.

    Raises:
        ValueError: flags are missing or contradict each other.
    """

    load: str = ""
    """directory of checkpoints, or a Hugging Face folder"""
    load_step: int = 0
    texts: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """text files; "-": the standard input"""
    from_trace: str = ""
    """trace file to read instead of running the model"""
    max_tokens: int | None = None
    """tokens of all texts that the model runs on; None: DEFAULT_MAX_TOKENS"""
    window: int | None = None
    """tokens that the model sees at most; None or 0: as many as it has positions"""

    def __post_init__(self):
        has_texts = bool(self.texts or self.files)
        if self.from_trace:
            require(
                not has_texts,
                "--from-trace",
                self.from_trace,
                "only without --text and --file, whose routing it would not show",
            )
            for flag, value in (("--max-tokens", self.max_tokens), ("--window", self.window)):
                require(value is None, flag, value, "only without --from-trace")
            require(
                bool(self.load) or not self.load_step,
                "--load-step",
                self.load_step,
                "only with --load",
            )
        else:
            most = self.most_tokens
            require(most > 0, "--max-tokens", most, "a positive integer")
            require(bool(self.load), "--load", "not set", "a model, or --from-trace FILE")
            require(has_texts, "--text", "not set", "--text, --file or --from-trace")

    @property
    def most_tokens(self) -> int:
        """Tokens of all texts that the model runs on."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens


def write_inspection(
    inputs: InspectionInputs,
    output: str | None,
    trace_file: str | None,
    page_tokens: int | None,
) -> list[str]:
    """Record or read a trace, and write the page and the trace file on rank 0. A collective.

    Args:
        output: HTML page; None: no page.
        trace_file: None: no file.
        page_tokens: tokens that the page shows at most; None: those of `PageOptions`.

    Returns:
        Lines about what was written; none on other ranks than 0.

    Raises:
        ValueError: a flag, the texts, the trace or the model is not valid.
        OSError: a file cannot be read or written.
    """
    require(bool(output or trace_file), "--output", "not set", "--output, --trace or both")
    for flag, path in (("--output", output), ("--trace", trace_file)):
        require(
            not path or (Path(path).parent.is_dir() and not Path(path).is_dir()),
            flag,
            path,
            "the path of a file in a folder that exists",
        )
    options = PageOptions(_title(inputs))
    if page_tokens is not None:
        require(bool(output), "--page-tokens", page_tokens, "only with --output")
        options = replace(options, max_tokens=page_tokens)
    if inputs.from_trace:
        trace = _read(inputs)
        if not is_rank0():
            return []
        lines = [f"read {inputs.from_trace}: {_describe(trace)}"]
        return lines + _write(trace, options, output, trace_file)
    run = initialize_inference(inputs.load, inputs.load_step)
    trace, notes = _record(inputs, run)
    lines = broadcast_from_rank0(
        lambda: _write(trace, replace(options, notes=notes), output, trace_file), run.groups
    )
    if not run.groups.is_rank0:
        return []
    return [f"ran {inputs.load}: {_describe(trace)}", *notes, *lines]


def run_identity(run: Run) -> str:
    """Return the identity of the weights of a run, see `megatron.interop.model_identity`."""
    if run.checkpoint is not None:
        return checkpoint_identity(run.checkpoint.path)
    return hf_identity(run.hf_folder)


def _title(inputs: InspectionInputs) -> str:
    path = Path(inputs.from_trace or inputs.load)
    if path.name == "checkpoints":
        path = path.absolute().parent
    return f"Routing of {path.name or path}"


def _describe(trace: RoutingTrace) -> str:
    return (
        f"tokens {trace.num_positions}, texts {len(trace.document_ranges)}, "
        f"MoE layers {len(trace.layers)}"
    )


def _read(inputs: InspectionInputs) -> RoutingTrace:
    """Read the trace file; with a model, check that it is the trace's and decode its tokens."""
    trace = read_routing_trace(inputs.from_trace)
    if not inputs.load:
        return trace
    run = initialize_inference(inputs.load, inputs.load_step)
    trace.require_model(run_identity(run), inputs.from_trace)
    if trace.texts is not None or trace.token_ids_T is None:
        return trace
    return with_texts(trace, run.tokenizer)


def with_texts(trace: RoutingTrace, tokenizer: Tokenizer) -> RoutingTrace:
    """Return a trace with the text of each of its token ids."""
    texts = []
    for start, end in trace.document_ranges:
        texts += token_texts(tokenizer, trace.token_ids_T[start:end].tolist())
    return replace(trace, texts=tuple(texts))


def _record(inputs: InspectionInputs, run: Run) -> tuple[RoutingTrace, tuple[str, ...]]:
    """Run the model over the texts; return the trace, and notes about what was cut."""
    max_positions = run.config.model.max_positions
    window = inputs.window or max_positions
    require(
        0 < window <= max_positions,
        "--window",
        window,
        f"1 to {max_positions}, the positions of the model, or 0 for all of them",
    )
    cut = broadcast_from_rank0(
        lambda: encode_texts(run.tokenizer, inspected_texts(inputs), inputs.most_tokens),
        run.groups,
    )
    identity = broadcast_from_rank0(lambda: run_identity(run), run.groups)
    model = build_inference_model(run)
    trace = record_texts(model, run.groups, run.tokenizer, cut.documents, window, identity)
    notes = []
    if cut.num_tokens > trace.num_positions:
        notes.append(
            f"The model ran on the first {trace.num_positions} of {cut.num_tokens} tokens "
            "(--max-tokens)."
        )
    if max(map(len, cut.documents)) > window:
        notes.append(
            f"Texts are cut into windows of {window} tokens, which see nothing of each other."
        )
    return trace, tuple(notes)


def inspected_texts(inputs: InspectionInputs) -> list[str]:
    """Return the texts of the flags, then those of the files.

    Raises:
        ValueError: a file is not text in UTF-8, or is larger than 256 MB.
        OSError: a file cannot be read.
    """
    texts = list(inputs.texts)
    for path in inputs.files:
        try:
            # /dev/stdin is not a regular file, which `read_text_file` requires.
            if path == "-":
                texts.append(sys.stdin.buffer.read().decode())
            else:
                texts.append(read_text_file(path, _LARGEST_FILE))
        except ValueError as error:
            raise ValueError(
                f"--file {path} cannot be read as text in UTF-8: {error}. Convert it to UTF-8, "
                "or name another file"
            ) from None
    return texts


def _write(
    trace: RoutingTrace, options: PageOptions, output: str | None, trace_file: str | None
) -> list[str]:
    lines = []
    if trace_file:
        write_routing_trace(trace_file, trace)
        lines.append(f"wrote {trace_file}: {Path(trace_file).stat().st_size} bytes")
    if output:
        size = write_routing_page(output, trace, options)
        lines.append(f"wrote {output}: {size} bytes")
    return lines
