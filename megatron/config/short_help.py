"""The text of --help: what a run needs first, the groups of flags, and an example.

--help-all lists all flags.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

from megatron.config.flag_parser import FlagParser, add_flag
from megatron.config.flags import EXPERT_OPTIONS, flags_of, is_gate_section, is_options_section

FIRST_FLAGS = {
    "every run needs": ("data_path", "tokenizer_type", "tokenizer_model", "train_iters"),
    "most runs set": (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "seq_length",
        "num_experts",
        "gate",
        "micro_batch_size",
        "global_batch_size",
        "lr",
        "bf16",
        "save",
        "load",
    ),
}
"""Fields whose flags --help shows, by group"""

EXAMPLE = """\
example: a small MoE model, trained for some seconds on two ranks
  yes '{"text": "the quick brown fox"}' | head -500 > fox.jsonl
  deepspeed --num_gpus 2 pretrain_gpt.py --streaming-data-path fox.jsonl \\
      --tokenizer-type ByteTokenizer --num-layers 2 --hidden-size 64 --seq-length 64 \\
      --num-experts 4 --gate topk --topk 2 --train-iters 20 --eval-iters 0 --save runs/fox
"""


def new_parser(
    prog: str | None, description: str | None, epilog: str | None = None
) -> FlagParser:
    """Return a parser without flags, in the layout of --help and --help-all."""
    layout = argparse.HelpFormatter
    if epilog:
        layout = argparse.RawDescriptionHelpFormatter
    return FlagParser(
        prog=prog,
        description=description,
        epilog=epilog,
        usage="%(prog)s [flags]",
        allow_abbrev=False,
        add_help=False,
        formatter_class=functools.partial(layout, max_help_position=36),
    )


def short_help(
    classes: Mapping[str, type],
    stored: Mapping[str, Mapping[str, Any]],
    shown: Mapping[str, str],
    prog: str | None,
    description: str | None,
) -> str:
    """Return the text of --help.

    Args:
        classes: config class of each section.
        stored: values of a run.json by section, shown as defaults.
        shown: titles of the sections of which all flags are shown, such as the gate's.
    """
    parser = new_parser(prog, description, f"{_groups(classes)}\n\n{EXAMPLE}")
    flags = [flag for section, cls in classes.items() for flag in flags_of(cls, section)]
    by_name = {flag.name: flag for flag in flags if not is_options_section(flag.section)}
    groups = {}
    for title, names in FIRST_FLAGS.items():
        groups[title] = [by_name[name] for name in names]
    for section, title in shown.items():
        groups[title] = [flag for flag in flags if flag.section == section]
    for title, members in groups.items():
        group = parser.add_argument_group(title)
        for flag in members:
            add_flag(group, flag, stored.get(flag.section, {}).get(flag.name, flag.default))
    return parser.format_help()


def _groups(classes: Mapping[str, type]) -> str:
    """Return a table of the groups of flags that --help-all lists."""
    lines = ["groups of flags, which --help-all lists in full:"]
    for section, cls in classes.items():
        summary = " ".join((cls.__doc__ or "").split())
        number = len(flags_of(cls, section))
        if section == EXPERT_OPTIONS:
            section = "expert"
            summary = "Options of the expert type; --expert-type NAME --help lists them."
        if is_gate_section(section):
            section = section.replace("gate_options", "gate")
            summary = "Options of the gate; --gate NAME --help lists them."
        lines.append(f"  {section:<16} {number:>3}  {summary}")
    return "\n".join(lines)
