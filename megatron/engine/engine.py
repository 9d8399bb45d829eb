"""Training engine: the DeepSpeed engine behind the few operations that training needs."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from megatron.config.fields import require
from megatron.config.schema import DeepSpeedConfig, OptimizerConfig, TrainConfig
from megatron.engine.ds_config import bucket_size, check_deepspeed_config, deepspeed_config
from megatron.engine.evaluation_model import EvaluationModel
from megatron.engine.frozen import (
    FrozenWeights,
    allow_frozen_parameters,
    require_gradients_of_inputs,
    require_trained_parameters,
)
from megatron.engine.loss import LossFunction, SumsByTerm, means, term_weights
from megatron.engine.moe_adapter import wrap_moe_layers
from megatron.engine.numerics_patches import (
    accumulate_in_fp32,
    let_zero3_partition_several_dtypes,
    reduce_in_fp32_buckets,
    skip_dummy_step,
)
from megatron.engine.optimizer import build_optimizer, set_learning_rate
from megatron.engine.part_grad_norms import PartGradNorms
from megatron.engine.startup_patches import freeze_gc
from megatron.engine.zero_shards import GlobalLayout, ZeroShards
from megatron.log import get_logger
from megatron.model.block import Block
from megatron.moe.experts.backends import COMPUTE_DTYPES
from megatron.moe.gate_update import GateUpdater
from megatron.moe.metrics import MoEMetrics
from megatron.parallel.groups import Groups

COUNTERS = ("global_steps", "skipped_steps", "global_samples")


class Engine:
    """One model under DeepSpeed: optimizer steps, evaluation, and state for checkpoints.

    Args:
        model: an initialized fp32 model on the CPU; it is moved to the device and cast.
        optimizer: learning rate, clipping and precision.
        ds_options: ZeRO stage, and a DeepSpeed configuration to merge.
        train: batch sizes.
        groups: the data-parallel ranks.
        evaluation_only: build no optimizer; the engine can only evaluate. DeepSpeed is then
            used under ZeRO 3 only, which shards the weights.
        routing_metrics: measure what --routing-metrics describes.

    Raises:
        ValueError: fp16 on the CPU, all parameters are frozen, or a --deepspeed_config that
            contradicts the flags or that DeepSpeed refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        ds_options: DeepSpeedConfig,
        train: TrainConfig,
        groups: Groups,
        evaluation_only: bool = False,
        routing_metrics: bool = True,
    ):
        require(
            not (optimizer.fp16 and groups.device.type == "cpu"),
            "--fp16",
            True,
            "only with a GPU",
            "Use --bf16, or leave it out for fp32.",
        )
        self.groups = groups
        self._optimizer: torch.optim.Optimizer | None = None
        if evaluation_only and ds_options.zero_stage < 3:
            dtype = COMPUTE_DTYPES[optimizer.precision]
            self.deepspeed = EvaluationModel(model, groups.device, dtype)
            if ds_options.deepspeed_config:
                get_logger().info(
                    "--deepspeed_config is not used: evaluation runs DeepSpeed under ZeRO 3 only"
                )
        else:
            self._start_deepspeed(model, optimizer, ds_options, train, evaluation_only)
        self.gate_updater = GateUpdater(self.model, groups)
        self.metrics = MoEMetrics(self.model, groups, routing_metrics)
        self._part_grad_norms: PartGradNorms | None = None
        if routing_metrics and self._optimizer is not None:
            self._part_grad_norms = PartGradNorms(
                self._optimizer, self.deepspeed, self.layout, groups
            )

    def _start_deepspeed(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        ds_options: DeepSpeedConfig,
        train: TrainConfig,
        evaluation_only: bool,
    ) -> None:
        """Give the model to DeepSpeed, with an optimizer unless it is only evaluated."""
        if not evaluation_only:
            require_trained_parameters(model)
        groups = self.groups
        config = deepspeed_config(optimizer, ds_options, train, groups.world_size)
        if ds_options.deepspeed_config:
            check_deepspeed_config(config, ds_options.deepspeed_config)
        elements = sum(p.numel() for p in model.parameters())
        config["zero_optimization"].setdefault("reduce_bucket_size", bucket_size(elements))
        # DeepSpeed calls collectives by the names that torch 2.13 announces to rename.
        warnings.filterwarnings(
            "ignore", category=FutureWarning, message=".*torch.distributed.*deprecated"
        )
        # With `offload_param`, ZeRO 3 has one buffer for all parameters, of one dtype.
        keep_gate_fp32 = "offload_param" not in config["zero_optimization"]
        if optimizer.precision != "fp32":
            stored = "fp32"
            if not keep_gate_fp32:
                stored = f"{optimizer.precision} with an fp32 master copy: offload_param is set"
            get_logger().info("router weights are stored in %s", stored)
        if ds_options.zero_stage == 3:
            let_zero3_partition_several_dtypes()
            # ZeRO 3's hooks find tensors in tuples only, and a gate uses its router's weight
            # without calling the router. So gather a block's weights together, not module by
            # module.
            set_z3_leaf_modules(model, [Block])
            require_gradients_of_inputs(model)
        self.layout = GlobalLayout.of(model, groups)
        self.frozen_weights = FrozenWeights(model, self.layout)
        wrap_moe_layers(model, groups, keep_gate_fp32=keep_gate_fp32)
        if not evaluation_only:
            self._optimizer = build_optimizer(model, optimizer, ds_options.zero_stage)
        # BF16_Optimizer prints memory figures, three lines a group.
        with (
            freeze_gc(),
            skip_dummy_step(),
            allow_frozen_parameters(model, ds_options.zero_stage),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=config, dist_init_required=False
            )
        if ds_options.zero_stage == 0 and optimizer.bf16:
            accumulate_in_fp32(self.model)
        if ds_options.zero_stage == 2 and not optimizer.grad_reduce_in_bf16:
            reduce_in_fp32_buckets(self.deepspeed.optimizer)
        self.frozen_weights.attach(self.deepspeed)

    @property
    def model(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped because a gradient or the loss was NaN or infinite."""
        return self.deepspeed.skipped_steps

    def set_global_batch(self, samples: int) -> None:
        """Set the samples of the following steps over all ranks, between two steps.

        The size of a micro-batch stays; their number follows.
        """
        if samples == self.deepspeed.train_batch_size():
            return
        self.deepspeed.set_train_batch_size(samples)
        # The last micro-batch of a step is the one whose number is a multiple of theirs.
        self.deepspeed.micro_steps = 0

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping, experts included; None before
        the first step."""
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def part_grad_norms(self) -> dict[str, float]:
        """Gradient norm of each part of the model in the last step, see `PartGradNorms.read`;
        empty without routing metrics. A collective."""
        if self._part_grad_norms is None:
            return {}
        return self._part_grad_norms.read(self.grad_norm())

    def step(
        self,
        batches: Iterable[Any],
        task: LossFunction,
        lr: float,
        progress: float,
        logged: bool = True,
    ) -> dict[str, Tensor]:
        """Run one optimizer step over its micro-batches.

        It is skipped when a gradient or the loss of any micro-batch on any rank is NaN or
        infinite. Otherwise the gates then update their state from what the step counted.

        Args:
            batches: this rank's micro-batches, as many as the global batch has; each has a
                method `to(device)`.
            task: computes their loss terms.
            lr: learning rate of the step.
            progress: share of the training that is done, for gates that change over time.
            logged: measure gradient norms of parts, and details of routings.

        Returns:
            By term, this rank's part of the step's loss, 0-d fp32: the mean over ranks is the
            sum over all target tokens of the global batch divided by their number.

        Raises:
            ValueError: there are fewer micro-batches, or more.
        """
        self.deepspeed.train()
        self.metrics.count_details(training=True, enabled=logged)
        if self._part_grad_norms is not None:
            self._part_grad_norms.start_step(measure=logged)
        set_learning_rate(self._optimizer, lr)
        skipped_before = self.skipped_steps
        batches = [batch.to(self.groups.device) for batch in batches]
        micro_steps = self.deepspeed.gradient_accumulation_steps()
        if len(batches) != micro_steps:
            raise ValueError(
                f"the task gave {len(batches)} of the {micro_steps} micro-batches of a step; "
                f"allowed: {micro_steps}, the global batch divided by ranks and micro-batch size"
            )
        normalizers = [task.normalizers(batch) for batch in batches]
        weights = term_weights(normalizers, self.groups)
        losses = []
        for batch, normalizer, weight in zip(batches, normalizers, weights, strict=True):
            terms = means(task.loss_sums(self.deepspeed, batch, progress), normalizer)
            weighted = {name: term * weight[name] for name, term in terms.items()}
            self._backward_and_step(sum(weighted.values()))
            losses.append({name: term.detach() for name, term in weighted.items()})
        self.metrics.end_step()
        self.gate_updater.post_optimizer_step(skipped=self.skipped_steps > skipped_before)
        return _mean_by_term(losses)

    def _backward_and_step(self, loss: Tensor) -> None:
        """Run the backward pass of a micro-batch; the last one of a step updates the weights.

        A loss that is not finite can have finite gradients. They are then made NaN: DeepSpeed's
        optimizers, and `ClippedAdamW` without ZeRO, skip a step with such gradients on all
        ranks. A factor of 1 changes nothing.
        """
        self.deepspeed.backward(loss * torch.where(loss.isfinite(), 1.0, float("nan")))
        self.deepspeed.step()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Put the model into evaluation mode; what MoE layers count there is not logged.

        A collective at the end: all ranks must run the model equally often.

        Yields:
            A module that runs the model as in training.
        """
        self.deepspeed.eval()
        self.metrics.count_details(training=False, enabled=False)
        try:
            yield self.deepspeed
        finally:
            self.metrics.count_details(training=False, enabled=True)
            self.deepspeed.train()
        self.metrics.read(training=False)

    def full_parameters(
        self, parameters: Iterable[nn.Parameter]
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which parameters of this rank have all their elements.

        ZeRO 3 shards them; then entering is a collective. Changes to them are lost. Experts of
        other ranks stay there.
        """
        parameters = list(parameters)
        if not any(hasattr(parameter, "ds_id") for parameter in parameters):
            return contextlib.nullcontext()
        return deepspeed.zero.GatheredParameters(parameters)

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[Any], task: LossFunction, progress: float
    ) -> dict[str, float]:
        """Return the losses over all micro-batches of all ranks, without dropout.

        Args:
            batches: this rank's micro-batches, one or more.
            task: computes their loss terms.
            progress: as in `step`.

        Returns:
            By term, the sum over all micro-batches and ranks divided by the sum of the
            normalizers, which is NaN for a term without any target.

        Raises:
            ValueError: there is no micro-batch.
        """
        self.deepspeed.eval()
        totals = SumsByTerm(self.groups)
        for batch in batches:
            batch = batch.to(self.groups.device)
            normalizers = task.normalizers(batch)
            totals.add(task.loss_sums(self.deepspeed, batch, progress), normalizers)
        self.deepspeed.train()
        return totals.means_over_ranks()

    def zero_shards(self) -> ZeroShards:
        """What this rank's optimizer holds, for checkpoints."""
        return ZeroShards(self.deepspeed, self.layout)

    def counters(self) -> dict[str, int]:
        """DeepSpeed's counts of steps, for checkpoints."""
        return {name: getattr(self.deepspeed, name) for name in COUNTERS}

    def set_counters(self, counters: dict[str, int]) -> None:
        """Restore what `counters` returned."""
        for name in COUNTERS:
            setattr(self.deepspeed, name, counters[name])


def _mean_by_term(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average each term over micro-batches."""
    means_by_term = {}
    for name in losses[0]:
        means_by_term[name] = torch.stack([terms[name] for terms in losses]).mean()
    return means_by_term
