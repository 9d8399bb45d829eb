"""Metric writer of the console: one line per row, in columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.log import get_logger
from megatron.training.metric_rows import RUN_KIND, MetricsRow
from megatron.training.writer_settings import WriterSettings


class ConsoleWriter:
    """Logs one line per row, with the columns whose metrics the row has."""

    def __init__(self, iterations: int, tokens: int):
        self.iterations = iterations
        self.tokens = tokens

    @staticmethod
    def create(settings: WriterSettings) -> ConsoleWriter:
        return ConsoleWriter(settings.iterations, settings.tokens)

    def write(self, row: MetricsRow) -> None:
        if row["kind"] == RUN_KIND:  # the log describes the run in its own words
            return
        fields = [self._position(row)]
        fields += [column.text(row) for column in _COLUMNS if column.metric in row]
        is_train = row["kind"] == "train"
        if not is_train and "experts_per_token_by_layer" in row:
            by_layer = [
                _format(number, "{:.2f}") for number in row["experts_per_token_by_layer"]
            ]
            fields.append(f"by layer {' '.join(by_layer)}")
        if "elapsed_s" in row:
            fields.append(f"elapsed {_format_duration(row['elapsed_s'])}")
        if is_train and "consumed_tokens" in row:
            # Not by iterations, which take longer when the batch has grown.
            left_s = (self.tokens - row["consumed_tokens"]) / row["tokens_per_s"]
            fields.append(f"left {_format_duration(left_s)}")
        get_logger().info(" | ".join(fields))

    def _position(self, row: MetricsRow) -> str:
        """Format the row's kind and iteration, e.g. `iteration   10/1000`."""
        label = "iteration" if row["kind"] == "train" else f"{row['kind']} at"
        width = len(str(self.iterations))
        return f"{label} {row['iteration']:{width}d}/{self.iterations}"

    def close(self) -> None:
        """Do nothing: no file is open."""


@dataclass(frozen=True)
class _Column:
    """A metric on the console."""

    metric: str
    template: str
    """Text with one {} field, whose width aligns the columns of consecutive lines."""
    detail: _Column | None = None
    """Another metric that follows in parentheses if the row has it."""

    def text(self, row: MetricsRow) -> str:
        text = _format(row[self.metric], self.template)
        if self.detail is not None and self.detail.metric in row:
            text += f" ({self.detail.text(row)})"
        return text


_COLUMNS = (
    _Column("loss", "loss {:8.5f}"),
    _Column("perplexity", "perplexity {:10.3f}"),
    _Column("aux_loss", "aux {:9.3e}"),
    _Column("lr", "lr {:9.3e}"),
    _Column("grad_norm", "grad norm {:7.3f}"),
    _Column("tokens_per_s", "{:9,.0f} tokens/s"),
    _Column(
        "experts_per_token",
        "experts/token {:5.2f}",
        _Column("experts_per_token_before_capacity", "before capacity {:5.2f}"),
    ),
    _Column("load_imbalance_max_over_mean", "load max/mean {:6.2f}"),
    _Column("dropped_assignment_fraction", "dropped {:6.2%}"),
    _Column("routing_churn", "churn {:6.2%}"),
    _Column("router_saturation", "saturation {:7.2%}"),
    _Column("expert_similarity_mean", "expert similarity {:7.4f}"),
    _Column("skipped_steps", "skipped {:3.0f}"),
    _Column("seconds", "{:6.1f} s"),
    _Column("failures", "failed {:2.0f}"),
    _Column("acc", "acc {:7.4f}"),
    _Column("acc_norm", "acc_norm {:7.4f}"),
    _Column("exact_match", "exact_match {:7.4f}"),
    _Column("word_perplexity", "perplexity per word {:10.3f}"),
    _Column("bits_per_byte", "bits per byte {:7.4f}"),
)


def _format(value: float | None, template: str) -> str:
    """Format a number, or NaN and infinities by name, padded to a number's width.

    None, the value of a layer without the metric, is written as a dash.
    """
    if value is not None and math.isfinite(value):
        return template.format(value)
    prefix, _, rest = template.partition("{")
    suffix = rest.partition("}")[2]
    width = len(template.format(0)) - len(prefix) - len(suffix)
    if value is None:
        name = "-"
    elif math.isnan(value):
        name = "NaN"
    elif value > 0:
        name = "Infinity"
    else:
        name = "-Infinity"
    return prefix + name.rjust(width) + suffix


def _format_duration(seconds: float) -> str:
    """Format seconds as hours:minutes:seconds."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
