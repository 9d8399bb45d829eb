"""The mixture-of-experts layer: gate -> plan -> dispatch -> experts -> combine, plus shared experts and local paths.

Plain torch: it imports no DeepSpeed, so inference, export and gate tests need none. `megatron.moe.deepspeed.attach`
adds the bookkeeping that DeepSpeed's engine looks for.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.moe.dispatch import Combine, Gather, Plan, capacity, count, make_plan, return_rows, send_rows
from megatron.moe.experts import GroupedExperts
from megatron.moe.gates import Gate
from megatron.moe.routing import FFNContext, FFNOutput, GateInput, Routing


class MoELayer(nn.Module):
    """A feed-forward layer in which a gate chooses the experts of each token.

    Args:
        gate: answers which experts each token visits; owns the router.
        experts: this rank's slice of the routed experts.
        num_experts: routed experts over all ranks of the expert-parallel group.
        shared: an always-on MLP `(x, context) -> FFNOutput`, or None.
        train_capacity_factor, eval_capacity_factor, min_capacity: see `dispatch.capacity`; factor 0 is dropless.
        ep_group: the ranks that share the experts; None when this rank holds all of them.
    """

    def __init__(self, gate: Gate, experts: GroupedExperts, num_experts: int, *, shared: nn.Module | None = None,
                 train_capacity_factor: float = 0.0, eval_capacity_factor: float = 0.0, min_capacity: int = 4,
                 ep_group: dist.ProcessGroup | None = None):
        super().__init__()
        self.gate, self.experts, self.shared = gate, experts, shared
        self.num_experts = num_experts
        self.capacity_factors = {True: train_capacity_factor, False: eval_capacity_factor}
        self.min_capacity = min_capacity
        self.dispatch_group = ep_group
        self.counters: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        """sums since the last reading, by training mode; `megatron.moe.metrics` reads and clears them"""
        self._checked = False

    def forward(self, x_BSD: Tensor, context: FFNContext | None = None) -> FFNOutput:
        """Args: x_BSD: normalised hidden states. Returns: FFNOutput with y [B, S, D] and the gate's aux loss."""
        context = context or FFNContext()
        x_TD = x_BSD.flatten(0, -2)
        routing = self.gate(self._gate_input(x_BSD, context))
        if not self._checked:
            routing.check(len(x_TD), self.num_experts + len(self.gate.local_paths))
            self._checked = True
        limit = capacity(len(x_TD), self.num_experts, self.capacity_factors[self.training], self.min_capacity)
        plan = make_plan(routing, len(x_TD), self.num_experts, len(self.gate.local_paths), limit)
        rows_SD = Gather.apply(x_TD, plan)
        rows_SD = self._run(rows_SD, plan)
        y_TD = Combine.apply(rows_SD, routing.weight_A[plan.assignment_S], plan)
        y_BSD = y_TD.view_as(x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD, context).y
        self._count(routing, plan, len(x_TD))
        return FFNOutput(y_BSD, routing.aux_loss, routing.carry)

    def _run(self, rows_SD: Tensor, plan: Plan) -> Tensor:
        """Outputs of the chosen experts, row for row; rows of local paths come last and never leave the rank."""
        paths = self.gate.local_paths
        routed_SD, local = rows_SD, []
        if len(paths):
            local_counts = plan.kept_C[self.num_experts:].tolist()
            routed_SD, *local = rows_SD.split([len(rows_SD) - sum(local_counts), *local_counts])
        rows_RD, exchange = send_rows(routed_SD, plan.kept_C[: self.num_experts], self.dispatch_group)
        rows_RD = self.experts(rows_RD, exchange.counts)
        routed_SD = return_rows(rows_RD, exchange, self.dispatch_group)
        if not len(paths):
            return routed_SD
        return torch.cat([routed_SD, *(path(x) for path, x in zip(paths, local, strict=True))])

    def _gate_input(self, x_BSD: Tensor, context: FFNContext) -> GateInput:
        ids = context.token_ids_BS
        sequence_T = None
        if x_BSD.dim() == 3:
            sequence_T = torch.arange(len(x_BSD), device=x_BSD.device).repeat_interleave(x_BSD.shape[1])
        return GateInput(x_BSD.flatten(0, -2), None if ids is None else ids.flatten(), sequence_T, context.carry,
                         context.progress)

    @torch.no_grad()
    def _count(self, routing: Routing, plan: Plan, num_tokens: int) -> None:
        """Add this forward to the counters. Sums carry their own counts, because recompute runs forward twice."""
        kept_T = plan.bags_T1.diff()
        wanted_T = count(routing.token_A, num_tokens)
        one, choices = torch.ones((), device=kept_T.device), len(plan.kept_C)
        seen = {
            "tokens": one * num_tokens,
            "wanted_C": plan.wanted_C.float(),
            "kept_C": plan.kept_C.float(),
            "lost_tokens": (kept_T < wanted_T).sum().float(),
            "kept_histogram": count(kept_T.clamp_max(choices), choices + 1).float(),
            "forwards": one,
            "aux_loss": routing.aux_loss.float(),
            **{f"stat/{name}": value.float() for name, value in routing.stats.items()},
        }
        sums = self.counters[self.training]
        for name, value in seen.items():
            sums[name] = sums[name] + value if name in sums else value.detach().clone()
