"""The MoE layer: gate -> plan -> dispatch -> experts -> combine.

Shared experts and zero-computation experts run on the token's own rank while rows are
in flight to other ranks.

The layer is plain torch and imports no DeepSpeed, so a layer or a gate can be tried
without it. `megatron.engine.moe_adapter.wrap_moe_layers` adds the bookkeeping that
DeepSpeed's engine looks for.

Padding is not routed: it has no assignments, takes no capacity and is not counted. The
experts' output there is 0, while shared experts compute it like any other position.

Shape suffixes: B sequences, S positions (of a hidden state) or sorted rows (elsewhere),
T = B x S positions on this rank, R those that are not padding, D hidden, C choices
(routed and zero-computation experts), E routed experts, G and N as in
`megatron.moe.routing`.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron.moe.decisions import DecisionRecorder, DecisionRepeater
from megatron.moe.dispatch.dispatchers import (
    AllToAllDispatcher,
    LocalDispatcher,
    TokenDispatcher,
)
from megatron.moe.dispatch.permute import GatherWeights, PermuteTokens, UnpermuteTokens
from megatron.moe.dispatch.plan import (
    DispatchPlan,
    build_dispatch_plan,
    capacity_from_factor,
)
from megatron.moe.experts.expert_type import ExpertType
from megatron.moe.ffn import FFNContext, FFNOutput, TokenLayout
from megatron.moe.gate import Gate
from megatron.moe.layer_counters import add_counts, forward_counts, step_counts
from megatron.moe.losses import named_losses
from megatron.moe.routing import GateInput, Routing
from megatron.moe.routing_details import detail_counts
from megatron.moe.sequence_routing import route_each_sequence
from megatron.parallel.groups import Groups, all_reduce_sum


class RoutingObserver(Protocol):
    """Receives what a layer's gate was given, its routing, and what was dispatched of it.

    Padding has no assignments.
    """

    def __call__(self, inp: GateInput, routing: Routing, plan: DispatchPlan) -> None: ...


class MoELayer(nn.Module):
    """A feed-forward layer in which a gate chooses the experts of each token.

    Args:
        gate: chooses the experts of each token; owns the router.
        experts: this rank's slice of the routed experts.
        num_experts: stacked weights of `experts` over all ranks of the expert-parallel
            group, which is how checkpoints count them. For PEER these are blocks of many
            experts; the gate has the number of experts.
        shared: an always-on MLP `(x, context) -> FFNOutput`, or None.
        train_capacity_factor: capacity factor in training; 0 is dropless.
        eval_capacity_factor: capacity factor in evaluation; 0 is dropless.
        min_capacity: smallest capacity of an expert, see `capacity_from_factor`.
        groups: the ranks that share the experts, and those whose loads a balance loss
            of scope global-batch adds up.
    """

    def __init__(
        self,
        gate: Gate,
        experts: ExpertType,
        num_experts: int,
        *,
        shared: nn.Module | None = None,
        train_capacity_factor: float = 0.0,
        eval_capacity_factor: float = 0.0,
        min_capacity: int = 4,
        groups: Groups | None = None,
    ):
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared = shared
        self.shared_gate: nn.Linear | None = None
        """its sigmoid multiplies the output of `shared`; None: nothing does"""
        self.fc1_latent_proj: nn.Linear | None = None
        """projection of the token rows that are sent to the experts; None: the experts
        take hidden states"""
        self.fc2_latent_proj: nn.Linear | None = None
        """projection of the experts' combined outputs back to hidden states"""
        self.num_experts = num_experts
        self.capacity_factors = {True: train_capacity_factor, False: eval_capacity_factor}
        self.min_capacity = min_capacity
        self.groups = groups or Groups()
        self.dispatcher = self._make_dispatcher()
        self.counters: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        """fp64 sums since the last reading, by training mode; `megatron.moe.metrics`
        reads and clears them"""
        self.counts_details = {True: False, False: False}
        """whether forward passes also measure `detail_counts`, by training mode"""
        self.step_sums: dict[str, Tensor] = {}
        """fp64 sums since the last optimizer step, on this rank"""
        self._step_loads: list[tuple[Tensor, Tensor]] = []
        self._sums_loads_over_step = False
        self.router_logits: nn.Module | None = None
        """a module `(logits_TC, gate_input)` that is called with the logits of each routing, for
        programs that record the outputs of modules; None: nothing is called"""
        self.routing_observer: RoutingObserver | None = None
        """called with each routing that is not recomputed, see `RoutingObserver`"""
        self.check_routing = False
        """check the values of every routing, not only of the first: one device sync"""
        self._recompute_cache: dict[str, Any] | None = None
        self._is_recompute = False
        self._routing_checked = False

    def forward(self, x_BSD: Tensor, context: FFNContext | None = None) -> FFNOutput:
        """Run the layer.

        Args:
            x_BSD: normalised hidden states; [T, D] is accepted as well.
            context: token ids, padding and documents, the carry of the previous layer with
                the same gate, and training progress.
        Returns:
            FFNOutput with y in the shape of x and the gate's auxiliary loss and carry.
        """
        context = context or FFNContext()
        x_TD = x_BSD.flatten(0, -2)
        inp = self._gate_input(x_BSD, context)
        routing, plan = self._route(inp, context)
        if self.router_logits is not None:
            self.router_logits(routing.choice_logits_TC, inp)
        if self.routing_observer is not None and not self._is_recompute:
            self.routing_observer(inp, routing, plan)
        in_flight = self.dispatcher.start(self._to_latent(x_TD), routing, plan)
        local_outputs = self._local_outputs(x_BSD, routing, plan, context)  # overlaps
        expert_inputs, metadata = self.dispatcher.finish(in_flight)
        expert_output = self.experts(*expert_inputs)
        y_TD = self._from_latent(self.dispatcher.combine(expert_output, metadata))
        for output_TD in local_outputs:
            y_TD = y_TD + output_TD
        losses = named_losses(routing, self.gate.config)
        aux_loss = sum(losses.values(), self._aux_loss(routing))
        self._update_counters(inp, routing, plan, {"aux_loss": aux_loss, **losses})
        return FFNOutput(y_TD.view_as(x_BSD), aux_loss, routing.carry)

    def run_experts_in_latent_space(self, hidden_size: int, latent_size: int) -> None:
        """Add projections around the routed experts, which then take and give rows [N].

            y = W_up sum_e w_e E_e(W_down x)

        The gate, shared experts and zero-computation experts see x itself. Rows of N
        numbers are sent to other ranks instead of D.

        Source: Nemotron 3 (NVIDIA 2025, LatentMoE); the names are Megatron's.
        """
        self.fc1_latent_proj = nn.Linear(hidden_size, latent_size, bias=False)
        self.fc2_latent_proj = nn.Linear(latent_size, hidden_size, bias=False)

    def gate_shared_experts(self, hidden_size: int) -> None:
        """Multiply the output of the shared experts by sigmoid(w x), with one w for the layer.

        Source: Qwen2-MoE (Qwen Team 2024).
        """
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False)

    @property
    def latent_projections(self) -> list[nn.Linear]:
        """The projections around the experts; none without a latent space."""
        if self.fc1_latent_proj is None:
            return []
        return [self.fc1_latent_proj, self.fc2_latent_proj]

    def _to_latent(self, x_TD: Tensor) -> Tensor:
        if self.fc1_latent_proj is None:
            return x_TD
        return self.fc1_latent_proj(x_TD)

    def _from_latent(self, y_TN: Tensor) -> Tensor:
        if self.fc2_latent_proj is None:
            return y_TN
        return self.fc2_latent_proj(y_TN)

    @property
    def carry_key(self) -> Hashable:
        """Key of the layers among which carries are passed: those with the same gate."""
        return type(self.gate)

    def _make_dispatcher(self) -> TokenDispatcher:
        if self.groups.ep_group is None:
            return LocalDispatcher()
        return AllToAllDispatcher(self.groups.ep_group)

    def _route(self, inp: GateInput, context: FFNContext) -> tuple[Routing, DispatchPlan]:
        """Run the gate and plan the dispatch.

        The recomputed pass takes the gate's decisions and the plan of the first pass.
        """
        cache = self._recompute_cache
        if self._is_recompute:
            repeater = DecisionRepeater(cache["decisions"], self._gate_name())
            with self.gate.use_decisions(repeater):
                routing = self._run_gate(inp, context)
            self._check_repeated(routing)
            return routing, cache["plan"]
        if cache is None:
            routing = self._run_gate(inp, context)
        else:
            recorder = DecisionRecorder()
            with self.gate.use_decisions(recorder):
                routing = self._run_gate(inp, context)
            cache["decisions"] = recorder.entries
            cache["assignments"] = _fingerprint(routing)
        num_positions = len(inp.x_TD)
        self._check(routing, inp)
        plan = self._plan(routing, num_positions, self._expert_capacity(inp, context))
        if cache is not None:
            cache["plan"] = plan
        return routing, plan

    def _gate_name(self) -> str:
        gate_class = type(self.gate)
        return f"gate {getattr(gate_class, 'name', gate_class.__name__)}"

    def _check_repeated(self, routing: Routing) -> None:
        """Compare the assignments of a recomputed pass with those of the first.

        Their values are compared on the CPU only: elsewhere this would synchronise with
        the device.
        """
        count, fingerprint = _fingerprint(routing)
        first_count, first_fingerprint = self._recompute_cache["assignments"]
        same = count == first_count
        if same and fingerprint.device.type == "cpu":
            same = bool(fingerprint == first_fingerprint)
        assert same, (
            f"{self._gate_name()} assigns other experts when activation recomputation runs it "
            "again; its forward must compute token_A and expert_A from inp by torch operations"
        )

    def _gate_input(self, x_BSD: Tensor, context: FFNContext) -> GateInput:
        token_ids_T = None
        if context.token_ids_BS is not None:
            token_ids_T = context.token_ids_BS.flatten()
        layout = context.layout or TokenLayout()
        padding_T = None
        if layout.padding_BS is not None:
            padding_T = layout.padding_BS.flatten()
        sequence_T, num_sequences = _sequences(x_BSD, layout)
        return GateInput(
            x_BSD.flatten(0, -2),
            token_ids_T,
            sequence_T,
            context.carry,
            context.progress,
            num_sequences,
            padding_T,
            layout.unpadded_R,
        )

    def _run_gate(self, inp: GateInput, context: FFNContext) -> Routing:
        """Call the gate, with one sequence at a time if others must not matter to it."""
        if context.independent_sequences and self.gate.sees_other_tokens:
            return route_each_sequence(self.gate, inp)
        return self.gate(inp)

    def _check(self, routing: Routing, inp: GateInput) -> None:
        """Check the gate contract.

        Checks of values synchronise with the device: they are made in the first forward
        pass, and in all with `check_routing`.
        """
        num_choices = self.gate.num_experts + len(self.gate.zero_computation_experts)
        try:
            if self.check_routing or not self._routing_checked:
                routing.check(
                    len(inp.x_TD),
                    num_choices,
                    finite=self.check_routing,
                    num_logits=inp.num_tokens,
                )
            else:
                routing.check_layout()
        except AssertionError as error:
            raise AssertionError(f"{self._gate_name()}: {error}") from None
        self._routing_checked = True

    def _plan(
        self, routing: Routing, num_tokens: int, capacity: int | Tensor | None
    ) -> DispatchPlan:
        """Sort the assignments of `num_tokens` positions, padding included, by expert."""
        zero_computation = self.gate.zero_computation_experts
        return build_dispatch_plan(
            routing,
            num_tokens,
            self.gate.num_experts,
            num_zero_computation=len(zero_computation),
            capacity=capacity,
            num_zero_output=sum(getattr(e, "is_zero", False) for e in zero_computation),
            group=self.groups.ep_group,
        )

    def _expert_capacity(self, inp: GateInput, context: FFNContext) -> int | Tensor | None:
        """Return the limit on rows per expert, by the gate's own rule or the formula.

        It is a share of the tokens that are not padding.

        Returns:
            The limit of every routed expert, int64 [C] from a gate with its own rule,
            or None for no limit.
        """
        factor = self.capacity_factors[self.training]
        num_tokens = inp.num_tokens
        if context.independent_sequences:
            factor = 0.0
        if factor:
            capacities = self.gate.capacities(num_tokens, factor, self.min_capacity)
            if capacities is not None:
                return torch.tensor(capacities, device=inp.x_TD.device)
        return capacity_from_factor(
            num_tokens,
            self.gate.num_experts,
            factor,
            self.min_capacity,
            k=self.gate.capacity_k(),
        )

    def _local_outputs(
        self, x_BSD: Tensor, routing: Routing, plan: DispatchPlan, context: FFNContext
    ) -> list[Tensor]:
        """Run the experts that need no communication; return [T, D] of each kind."""
        outputs = []
        if plan.zero_computation is not None:
            outputs.append(self._zero_computation_output(x_BSD, routing, plan))
        if self.shared is not None:
            outputs.append(self._shared_output(x_BSD, context).flatten(0, -2))
        return outputs

    def _shared_output(self, x_BSD: Tensor, context: FFNContext) -> Tensor:
        y_BSD = self.shared(x_BSD, context).y
        if self.shared_gate is None:
            return y_BSD
        return torch.sigmoid(self.shared_gate(x_BSD)) * y_BSD

    def _zero_computation_output(
        self, x_BSD: Tensor, routing: Routing, plan: DispatchPlan
    ) -> Tensor:
        permuted = plan.zero_computation
        x_SD = PermuteTokens.apply(x_BSD.flatten(0, -2), permuted)
        inputs = x_SD.split(plan.zero_computation_counts)
        # Experts without rows run too: ZeRO 2 needs a gradient of every parameter on
        # every rank, if only zeros.
        outputs = [
            expert(x_nD)
            for expert, x_nD in zip(self.gate.zero_computation_experts, inputs, strict=True)
        ]
        y_SD = torch.cat(outputs)
        weight_S = GatherWeights.apply(routing.weight_A, permuted)
        return UnpermuteTokens.apply(y_SD, weight_S, permuted)

    def _aux_loss(self, routing: Routing) -> Tensor:
        """Return the gate's loss plus its balance losses of scope global-batch.

        In training their loads are summed over all ranks and over the micro-batches of
        the step so far. In evaluation each rank uses its own loads and no
        communication.
        """
        if not routing.balance:
            return routing.aux_loss
        if not self.training:
            return routing.aux_loss + sum(term.loss() for term in routing.balance)
        if self._is_recompute:
            loads = self._recompute_cache["loads"]
        else:
            loads = self._global_loads(routing)
            if self._recompute_cache is not None:
                self._recompute_cache["loads"] = loads
        return routing.aux_loss + sum(
            term.loss(*load) for term, load in zip(routing.balance, loads, strict=True)
        )

    @torch.no_grad()
    def _global_loads(self, routing: Routing) -> list[tuple[Tensor, Tensor]]:
        """Sum (count, total) of each balance loss over ranks and micro-batches.

        The sum covers the micro-batches of this step up to and including this one, or
        this one only if nothing announces the end of a step. It takes one all-reduce.
        """
        local = []
        for term in routing.balance:
            local += [term.count_NG, term.total_N]
        flat = torch.cat([tensor.flatten() for tensor in local]).double()
        flat = all_reduce_sum(flat, self.groups).float()
        summed = flat.split([tensor.numel() for tensor in local])
        loads = []
        for i, term in enumerate(routing.balance):
            count_NG = summed[2 * i].view_as(term.count_NG)
            total_N = summed[2 * i + 1]
            if self._step_loads and self._sums_loads_over_step:
                previous_count_NG, previous_total_N = self._step_loads[i]
                count_NG = count_NG + previous_count_NG
                total_N = total_N + previous_total_N
            loads.append((count_NG, total_N))
        self._step_loads = loads
        return loads

    def sum_loads_over_step(self) -> None:
        """Add the loads of balance losses over the micro-batches of a step from now on.

        `GateUpdater` calls this, because it announces the end of every step. A training
        loop without it would otherwise add up the loads of all steps.
        """
        self._sums_loads_over_step = True
        self._step_loads = []

    def reset_step_state(self) -> None:
        """Clear the sums and loads of the finished optimizer step."""
        self.step_sums = {}
        self._step_loads = []

    def recompute_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return contexts for `torch.utils.checkpoint`: first pass and recomputed pass.

        The recomputed pass repeats the gate's decisions and the plan of the first pass. It
        updates no counters, communicates no loads and reuses the loads of the first pass.
        """
        cache: dict[str, Any] = {}
        return (
            _RecomputeContext(self, cache, is_recompute=False),
            _RecomputeContext(self, cache, is_recompute=True),
        )

    @torch.no_grad()
    def _update_counters(
        self, inp: GateInput, routing: Routing, plan: DispatchPlan, losses: dict[str, Tensor]
    ) -> None:
        """Add this forward pass to the counters, unless it is a recomputed one.

        Args:
            losses: the auxiliary loss, and parts of it that are logged, by name.
        """
        if self._is_recompute:
            return
        counters = self.counters[self.training]
        add_counts(counters, forward_counts(self.gate, inp, routing, plan, losses))
        if self.counts_details[self.training]:
            add_counts(counters, detail_counts(self.gate, inp, routing))
        if self.training:
            add_counts(self.step_sums, step_counts(self.gate, inp, routing, plan))


def _sequences(x_BSD: Tensor, layout: TokenLayout) -> tuple[Tensor | None, int]:
    """Return the document or sequence of each position, and how many there are."""
    if layout.document_BS is not None:
        return layout.document_BS.flatten(), layout.num_documents
    if x_BSD.dim() != 3:
        return None, 1
    sequence_B = torch.arange(len(x_BSD), device=x_BSD.device)
    return sequence_B.repeat_interleave(x_BSD.shape[1]), len(x_BSD)


class _RecomputeContext(AbstractContextManager):
    """Marks a forward pass of a layer as the first one or as a recomputed one.

    Reusable: with a retained graph the backward pass recomputes more than once.
    """

    def __init__(self, layer: MoELayer, cache: dict[str, Any], is_recompute: bool):
        self.layer = layer
        self.cache = cache
        self.is_recompute = is_recompute

    def __enter__(self) -> None:
        self.layer._recompute_cache = self.cache
        self.layer._is_recompute = self.is_recompute

    def __exit__(self, *error: object) -> None:
        self.layer._recompute_cache = None
        self.layer._is_recompute = False


def _fingerprint(routing: Routing) -> tuple[int, Tensor]:
    """Return the number of assignments and a 0-d int64 hash of them, in order.

    The products overflow, as those of hash functions do.
    """
    position_A = torch.arange(len(routing.token_A), device=routing.token_A.device)
    hash_A = routing.token_A
    for value_A in (routing.expert_A, position_A):
        hash_A = (hash_A ^ (hash_A >> 29)) * 0x3F58476D1CE4E5B9 + value_A
    hash_A = (hash_A ^ (hash_A >> 32)) * 0x14D049BB133111EB
    return len(hash_A), hash_A.sum()
