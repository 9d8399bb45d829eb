"""The training engine: DeepSpeed behind the few verbs the loop needs."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from megatron.config.schema import DeepSpeedConfig, OptimizerConfig, TrainConfig, require
from megatron.data.loader import Batch
from megatron.engine.ds_config import check_deepspeed_config, deepspeed_config
from megatron.engine.moe_adapter import wrap_moe_layers
from megatron.engine.optimizer import (
    AdamW,
    CheckedAdamW,
    parameter_groups,
    register_optimizer_with_zero,
)
from megatron.engine.startup_patches import freeze_gc
from megatron.engine.zero_shards import GlobalLayout, ZeroShards
from megatron.log import get_logger
from megatron.model.block import Block
from megatron.moe.metrics import MoEMetrics
from megatron.parallel.groups import Groups

COUNTERS = ("global_steps", "skipped_steps", "global_samples")


class Engine:
    """One model under DeepSpeed: forward and backward over micro-batches, one optimizer step, state in and out.

    Args:
        model: a finished fp32 model on the CPU; it is moved and cast.

    Raises:
        ValueError: fp16 on the CPU, or a --deepspeed_config that contradicts the flags or that DeepSpeed refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        ds_options: DeepSpeedConfig,
        train: TrainConfig,
        groups: Groups,
    ):
        require(
            not (optimizer.fp16 and groups.device.type == "cpu"),
            "--fp16",
            True,
            "only with a GPU",
            "Use --bf16, or leave it out for fp32.",
        )
        self.groups = groups
        config = deepspeed_config(optimizer, ds_options, train, groups.world_size)
        if ds_options.deepspeed_config:
            check_deepspeed_config(config, ds_options.deepspeed_config)
        # DeepSpeed calls collectives by the names that torch 2.13 announces to rename.
        warnings.filterwarnings(
            "ignore", category=FutureWarning, message=".*torch.distributed.*deprecated"
        )
        keep_gate_fp32 = ds_options.zero_stage < 3
        if optimizer.precision != "fp32":
            get_logger().info(
                "router weights are stored in %s",
                "fp32"
                if keep_gate_fp32
                else f"{optimizer.precision} with an fp32 master copy: ZeRO 3 partitions one dtype only",
            )
        if ds_options.zero_stage == 3:
            # ZeRO 3's hooks see tensors in tuples only, and a gate uses its router's weight without calling the
            # router: gather a block at once instead of module by module.
            set_z3_leaf_modules(model, [Block])
        self.layout = GlobalLayout.of(model, groups)
        wrap_moe_layers(model, groups, keep_gate_fp32=keep_gate_fp32)
        unwatched = ds_options.zero_stage == 0 and optimizer.precision == "fp32"
        adamw = (CheckedAdamW if unwatched else AdamW)(
            parameter_groups(model, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_eps,
            fused=True,
        )
        register_optimizer_with_zero()
        # BF16_Optimizer prints memory figures, three lines a group.
        with freeze_gc(), contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=adamw, config=config, dist_init_required=False
            )
        self._adamw = adamw
        self.metrics = MoEMetrics(self.model, groups)

    @property
    def model(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped because a gradient overflowed."""
        return self.deepspeed.skipped_steps

    def grad_norm(self) -> float:
        """Global gradient norm of the last step, before clipping, experts included."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    def step(
        self, batches: Iterable[Batch], lr: float, progress: float
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step over its micro-batches. Unless it is skipped, the gates then learn what it counted.

        It is skipped when a gradient or the loss of any micro-batch on any rank is NaN or infinite.

        Returns:
            (language-model loss, auxiliary loss): 0-d fp32 means over this rank's micro-batches.
        """
        self.deepspeed.train()
        for group in self._adamw.param_groups:
            group["lr"] = lr
        skipped, lm_losses, aux_losses = self.skipped_steps, [], []
        for batch in batches:
            out = self.deepspeed(**model_inputs(batch, self.groups), progress=progress)
            # A loss that is not finite can have finite gradients. These are then made NaN, for which DeepSpeed skips
            # the step on all ranks. A factor of 1 changes nothing.
            self.deepspeed.backward(
                out.loss * torch.where(out.loss.isfinite(), 1.0, float("nan"))
            )
            self.deepspeed.step()
            lm_losses.append(out.lm_loss.detach())
            aux_losses.append(out.aux_loss.detach())
        self.metrics.post_optimizer_step(skipped=self.skipped_steps > skipped)
        return torch.stack(lm_losses).mean(), torch.stack(aux_losses).mean()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], progress: float) -> Tensor:
        """Mean language-model loss over this rank's micro-batches, without dropout; 0-d fp32."""
        self.deepspeed.eval()
        losses = [
            self.deepspeed(**model_inputs(b, self.groups), progress=progress).lm_loss
            for b in batches
        ]
        self.deepspeed.train()
        return torch.stack(losses).mean()

    def partitions(self) -> ZeroShards:
        """What this rank's optimizer holds, for checkpoints."""
        return ZeroShards(self.deepspeed, self.layout)

    def counters(self) -> dict[str, int]:
        """DeepSpeed's counts of steps, for checkpoints."""
        return {name: getattr(self.deepspeed, name) for name in COUNTERS}

    def set_counters(self, counters: dict[str, int]) -> None:
        """Restore what `counters` returned."""
        for name in COUNTERS:
            setattr(self.deepspeed, name, counters[name])


def model_inputs(batch: Batch, groups: Groups) -> dict[str, Tensor | None]:
    """A micro-batch on this rank's device, as the model's keyword arguments."""
    batch = batch.to(groups.device)
    return {
        "tokens_BS": batch.tokens_BS,
        "labels_BS": batch.labels_BS,
        "loss_mask_BS": batch.loss_mask_BS,
        "position_ids_BS": batch.position_ids_BS,
        "segments_BS": batch.segments_BS,
    }
