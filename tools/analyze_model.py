"""Shows what a model costs: parameters, FLOPs, memory, communication and time of a step.

    python tools/analyze_model.py runs/x                       # a run, with its measured experts
    python tools/analyze_model.py runs/x/checkpoints --json costs.json --png costs.png
    python tools/analyze_model.py Mixtral-8x7B-v0.1 --seq-length 4096
    python tools/analyze_model.py --num-experts 64 --gate topk --topk 8 --vocab-size 50257 \\
        --ranks 8 --moe-expert-parallel-size 8 --bf16 --peak-tflops 900 --bandwidth-gb-s 4000
    python tools/analyze_model.py runs/x --measure-ceilings    # time of a step on this machine

The model is not built. It is that of pretrain_gpt.py's flags. A path before them is a run folder,
a folder of checkpoints, one checkpoint, a run.json, or a Hugging Face folder, of which config.json
is enough; flags then change what it says. The experts per token of a gate that chooses their number
are those of the run's last training row, unless --experts-per-token assumes another mean; without
either, costs are given for the fewest and the most. Memory and communication are those of a rank
in a training step, for --ranks and the flags of the run. The time of a step is expected where
ceilings of the hardware are measured or given. docs/model-cost.md says what is counted. --help
lists the most important flags, --help-all all of them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from megatron.analysis.ceilings import Ceilings
    from megatron.analysis.model_cost import AnalysedModel
    from megatron.analysis.model_source import ModelSource
    from megatron.analysis.rank_parameters import Topology
    from megatron.config.schema import RunConfig
    from megatron.parallel.groups import Groups

GPT2_VOCABULARY_SIZE = 50257


@dataclass(frozen=True)
class AnalysisOptions:
    """Flags of the analysis."""

    experts_per_token: float = 0.0
    """mean number of routed experts per token to assume for gates that choose it; 0: that of the
    run, or else the fewest and the most that the gates allow"""
    ranks: int = 0
    """number of ranks to plan memory, communication and time for; 0: those of the run, or else as
    many as this program and expert parallelism have"""
    device: str = ""
    """type of the ranks' devices, cuda or cpu; empty: that of this machine with
    --measure-ceilings, or else that of the run, or cuda"""
    measure_ceilings: bool = False
    """measure what this machine reaches, for the expected time of a step: matrix products at the
    model's shapes, memory and, with several ranks, the network. Start it with a launcher, such as
    torchrun, to measure the network"""
    save_ceilings: str = ""
    """JSON file for what --measure-ceilings finds, to be read by --ceilings"""
    ceilings: str = ""
    """JSON file that --save-ceilings wrote on the machine that the step is planned for"""
    peak_tflops: float = 0.0
    """10^12 operations per second that a rank reaches in matrix products of the dense layers and
    of the experts; replaces those of --ceilings"""
    bandwidth_gb_s: float = 0.0
    """10^9 bytes per second that a rank reads or writes in its device's memory; replaces that of
    --ceilings"""
    network_gb_s: float = 0.0
    """10^9 bytes per second that a rank sends in collectives; replaces those of --ceilings. 0:
    those of --ceilings, or else communication takes no time"""
    model_only: bool = False
    """print parameters and FLOPs only, which is faster"""
    json: str = ""
    """JSON file that the costs are written to"""
    png: str = ""
    """PNG file for a chart of the costs by part"""

    def __post_init__(self):
        from megatron.config.fields import require_not_negative, require_setting

        numbers = ("peak_tflops", "bandwidth_gb_s", "network_gb_s")
        require_not_negative(self, "experts_per_token", "ranks", *numbers)
        require_setting(self, "device", self.device in ("", "cpu", "cuda"), "cuda or cpu")
        if self.measure_ceilings:
            for name in ("ceilings", *numbers):
                is_unset = not getattr(self, name)
                require_setting(self, name, is_unset, "only without --measure-ceilings")
        if self.model_only:
            for name in ("measure_ceilings", "ceilings", *numbers):
                is_unset = not getattr(self, name)
                require_setting(self, name, is_unset, "only without --model-only")
        is_allowed = not self.save_ceilings or self.measure_ceilings
        require_setting(self, "save_ceilings", is_allowed, "only with --measure-ceilings")


def run(argv: list[str]) -> None:
    """Print the costs, and write them to the files that flags name.

    Started as several ranks, all of them measure, and rank 0 prints and writes.

    Raises:
        ValueError: a flag or the path of the model is wrong.
        OSError: a file cannot be read or written.
    """
    import json

    from megatron.analysis.ceilings import write_ceilings
    from megatron.analysis.model_cost import model_sections, report_dict, report_text
    from megatron.io.atomic_write import write_bytes, write_text

    source, flags = split_source(argv)
    words = [*source.flags, *flags] if source else flags
    config, options = parse_flags(words)
    check_output(options)
    analysed = analysed_model(config, options, source)
    analysed.check()
    ceilings = find_ceilings(config, options)
    sections = model_sections(analysed, ceilings, options.model_only)
    if int(os.environ.get("RANK", 0)):
        return
    print(report_text(sections))
    if options.save_ceilings:
        write_text(options.save_ceilings, write_ceilings(ceilings))
    if options.json:
        write_text(options.json, json.dumps(report_dict(sections), indent=1) + "\n")
    if options.png:
        from megatron.analysis.cost_chart import cost_png

        title = source.path if source else "Model of the flags"
        write_bytes(options.png, cost_png(sections, title))


def split_source(argv: list[str]) -> tuple[ModelSource | None, list[str]]:
    """Return what the path before the flags tells, and the flags.

    Raises:
        ValueError: the path is no model.
    """
    if not argv or argv[0].startswith("-"):
        return None, argv
    from megatron.analysis.model_source import find_model_source
    from megatron.config.gate_path import import_gate_paths
    from megatron.moe.gate_registry import import_gate_files

    import_gate_paths(argv[1:], import_gate_files)
    return find_model_source(argv[0]), argv[1:]


def parse_flags(words: list[str]) -> tuple[RunConfig, AnalysisOptions]:
    """Return the configuration of the model, and the flags of this program.

    Raises:
        ValueError: see `megatron.config.cli.parse`.
    """
    from megatron.config import cli
    from megatron.moe.experts.expert_type import KNOWN_EXPERT_TYPES
    from megatron.moe.gate import available_gates, gate_config_class
    from megatron.moe.gate_registry import import_gate_files

    return cli.parse_with(
        AnalysisOptions,
        words,
        gate_config_class,
        available_gates,
        import_gate_files,
        expert_types=KNOWN_EXPERT_TYPES,
        read_hf_config=read_hf_settings,
        prog="analyze_model.py",
        description=__doc__,
    )


def read_hf_settings(folder: str) -> dict:
    """Read the settings of a Hugging Face folder; other models do not import what reads them."""
    from megatron.interop.hf import initial_weights

    return initial_weights.read_hf_settings(folder)


def check_output(options: AnalysisOptions) -> None:
    """Check before the analysis that its files can be written.

    Raises:
        ValueError: one cannot, or the chart needs a package that is missing.
    """
    from megatron.config.fields import require

    for flag, path in (
        ("--json", options.json),
        ("--png", options.png),
        ("--save-ceilings", options.save_ceilings),
    ):
        is_file = Path(path).absolute().parent.is_dir() and not Path(path).is_dir()
        require(not path or is_file, flag, path, "a file in an existing folder")
    if options.png:
        from megatron.analysis.cost_chart import require_chart_packages

        require_chart_packages("--png")


def analysed_model(
    config: RunConfig, options: AnalysisOptions, source: ModelSource | None
) -> AnalysedModel:
    """Return the model to analyse, with what was measured if it is the source's own."""
    from megatron.analysis.model_cost import AnalysedModel
    from megatron.model.flops import ExpertUse

    topology = planned_topology(config, options, source)
    if source is None:
        return AnalysedModel(
            config,
            vocabulary_size(config),
            topology,
            assumed_experts=options.experts_per_token,
        )
    measured = None
    measured_in = ""
    row = source.training_row
    if row is not None and same_routing(parse_flags(list(source.flags))[0], config):
        measured = ExpertUse.of_metrics(row)
        measured_in = f"measured at iteration {row['iteration']} in {source.metrics_file}"
    return AnalysedModel(
        config,
        config.model.vocab_size or source.vocab_size or vocabulary_size(config),
        topology,
        assumed_experts=options.experts_per_token,
        measured=measured,
        measured_in=measured_in,
    )


def planned_topology(
    config: RunConfig, options: AnalysisOptions, source: ModelSource | None
) -> Topology:
    """Return the ranks that memory, communication and time are planned for.

    Raises:
        ValueError: fewer GPUs are here than ranks were started to measure.
    """
    from megatron.analysis.rank_parameters import Topology
    from megatron.parallel.groups import choose_comm_backend

    device = options.device
    if options.measure_ceilings and not device:
        device = choose_comm_backend()[1].type
    ranks = options.ranks
    if source is not None:
        device = device or source.device
        ranks = ranks or source.ranks
    if not ranks:
        started = int(os.environ.get("WORLD_SIZE", 1))
        ranks = max(started, config.moe.moe_expert_parallel_size)
    return Topology(ranks, device or "cuda")


def find_ceilings(config: RunConfig, options: AnalysisOptions) -> Ceilings | None:
    """Return the ceilings that are measured or given; None: neither.

    Raises:
        ValueError: --ceilings names no file of ceilings, or a number is missing.
    """
    from megatron.analysis.ceilings import given_ceilings, measure_ceilings

    if options.measure_ceilings:
        return measure_ceilings(config, started_ranks())
    return given_ceilings(
        options.ceilings, options.peak_tflops, options.bandwidth_gb_s, options.network_gb_s
    )


def started_ranks() -> Groups:
    """Return the ranks that this program was started as.

    Raises:
        ValueError, ConnectionError: see `init_distributed`.
    """
    from megatron.parallel.groups import Groups, choose_comm_backend

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from megatron.engine.distributed import init_distributed

        return init_distributed()
    return Groups(device=choose_comm_backend()[1])


def same_routing(first: RunConfig, second: RunConfig) -> bool:
    """Return whether the MoE layers of two configurations have the same gates and experts."""
    routings = []
    for config in (first, second):
        routings.append((config.moe, config.gate_options, config.model.num_layers))
    return routings[0] == routings[1]


def vocabulary_size(config: RunConfig) -> int:
    """Return the vocabulary size before padding; that of GPT-2 if its files are missing."""
    from megatron.tokenizer.build import build_tokenizer

    if config.model.vocab_size:
        return config.model.vocab_size
    try:
        return build_tokenizer(config.tokenizer).vocab_size
    except FileNotFoundError as error:
        if config.tokenizer.tokenizer_type != "GPT2BPETokenizer":
            raise
        print(f"(vocabulary taken as {GPT2_VOCABULARY_SIZE}: {error})")
        return GPT2_VOCABULARY_SIZE


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    from megatron.exit_codes import exit_code

    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    raise SystemExit(main())
