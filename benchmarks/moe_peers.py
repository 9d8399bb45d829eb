"""MoE layers of other systems and their baselines behind one interface: tokens in,
tokens out.

Every layer gets the same weights, all of them representable in bf16, and the same
tokens. Tokens are drawn so that every system selects the same experts for them: their
k-th and (k+1)-th logits differ by more than the rounding of a bf16 router. So outputs
and gradients can be compared value by value before anything is timed.

Shape suffixes: T tokens, D hidden, E experts, H expert width, k experts per token, S
rows (T x k), n rows of one expert.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.engine import distributed
from megatron.model.mlp import MLP
from megatron.moe.experts.activations import is_gated
from megatron.moe.experts.expert_type import ExpertContext, create_experts
from megatron.parallel.groups import Groups

MARGIN = 1 / 32
"""Twice the largest bf16 rounding error of logits below 8."""
HIDDEN_ACT = {"swiglu": "silu", "geglu": "gelu"}
"""transformers' names of the nonlinearities of gated activations."""


@dataclass(frozen=True)
class Size:
    """Shape of a layer and the number of its tokens."""

    tokens: int
    hidden: int
    experts: int
    width: int
    topk: int

    def __str__(self) -> str:
        return (
            f"T {self.tokens}, D {self.hidden}, E {self.experts}, H {self.width}, k {self.topk}"
        )

    @property
    def label(self) -> str:
        return f"E{self.experts} H{self.width} k{self.topk}"


@dataclass(frozen=True)
class Problem:
    """Weights of a layer, its input, and the gradient of its output."""

    size: Size
    activation: str
    x_TD: Tensor
    grad_TD: Tensor
    router_ED: Tensor
    """fp32; each system casts it to the dtype in which it computes scores"""
    w1_EHD: Tensor
    w2_EDH: Tensor
    w3_EHD: Tensor | None
    """None unless the activation is gated"""

    @staticmethod
    def draw(
        size: Size, activation: str, device: torch.device, rank: int = 0, skew: float = 0.0
    ) -> Problem:
        """Draw random weights, the same on every rank, and the rank's own random
        tokens.

        Args:
            skew: router rows are scaled from 1 - skew to 1 + skew, once in each half of
                the experts, so that each half has its share of popular ones. At 0 all
                experts get about equally many rows.
        """
        weights = torch.Generator(device).manual_seed(0)
        tokens = torch.Generator(device).manual_seed(1 + rank)

        def normal(generator: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
            empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return empty.normal_(0, std, generator=generator)

        scale_E = torch.linspace(1 - skew, 1 + skew, size.experts // 2, device=device).repeat(2)
        up_std = size.hidden**-0.5
        router_ED = normal(weights, size.experts, size.hidden, std=up_std) * scale_E[:, None]
        router_ED = router_ED.bfloat16().float()
        found: list[Tensor] = []
        while sum(map(len, found)) < size.tokens:
            x_TD = normal(tokens, size.tokens, size.hidden)
            found.append(x_TD[_clear_choice(x_TD.float() @ router_ED.T, size.topk)])
        up_shape = (size.experts, size.width, size.hidden)
        down_shape = (size.experts, size.hidden, size.width)
        grad_TD = normal(tokens, size.tokens, size.hidden)
        w1_EHD = normal(weights, *up_shape, std=up_std)
        w2_EDH = normal(weights, *down_shape, std=size.width**-0.5)
        w3_EHD = None
        if is_gated(activation):
            w3_EHD = normal(weights, *up_shape, std=up_std)
        return Problem(
            size,
            activation,
            torch.cat(found)[: size.tokens].clone(),
            grad_TD,
            router_ED,
            w1_EHD,
            w2_EDH,
            w3_EHD,
        )

    def float(self) -> Problem:
        """Return the same problem in fp32."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        wide = {name: v.float() for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **wide)

    def expert_weights(self, expert: int) -> dict[str, nn.Parameter]:
        """Return an expert's weights under the names of `MLP`; they share the stacks'
        memory."""
        first = nn.Parameter(self.w1_EHD[expert])
        down = nn.Parameter(self.w2_EDH[expert])
        if self.w3_EHD is None:
            return {"up_proj": first, "down_proj": down}
        return {
            "gate_proj": first,
            "up_proj": nn.Parameter(self.w3_EHD[expert]),
            "down_proj": down,
        }

    def make_expert(self, expert: int) -> MLP:
        return load_mlp(MLP(1, 1, self.activation), self.expert_weights(expert))


def _clear_choice(logits_TE: Tensor, topk: int) -> Tensor:
    """Return bool [T]: tokens whose experts do not change when logits are rounded to
    bf16."""
    if topk == logits_TE.shape[1]:
        return torch.ones(len(logits_TE), dtype=torch.bool, device=logits_TE.device)
    best_Tk1 = logits_TE.topk(topk + 1, dim=-1).values
    clear_T = best_Tk1[:, -2] - best_Tk1[:, -1] > MARGIN
    return clear_T & (logits_TE.abs().amax(-1) < 8)


def load_mlp(mlp: MLP, weights: dict[str, nn.Parameter]) -> MLP:
    """Replace the weights of an MLP, whatever its size was."""
    for name, weight in weights.items():
        getattr(mlp, name).weight = weight
    return mlp


@dataclass(frozen=True)
class Layer:
    """A function from tokens to tokens, with the modules that hold its parameters."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    experts: nn.Module
    """module that holds the experts' weights"""

    def step(self, problem: Problem) -> Callable[[], None]:
        """Return a function that runs forward and backward, to be timed.

        It drops the gradients at the end, so that the next step allocates its own and
        nothing stays alive while others are measured.
        """
        x_TD = problem.x_TD.detach().requires_grad_()
        grad_TD = problem.grad_TD

        def step() -> None:
            self.forward(x_TD).backward(grad_TD)
            self.module.zero_grad(set_to_none=True)
            x_TD.grad = None

        return step

    def results(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Compute results in fp32.

        Returns:
            The output [T, D], the gradient of the input [T, D], and the norm of the
            gradients of all experts' weights.
        """
        x_TD = problem.x_TD.detach().requires_grad_()
        y_TD = self.forward(x_TD)
        y_TD.backward(problem.grad_TD)
        norm = torch.stack([p.grad.float().norm() for p in self.experts.parameters()]).norm()
        self.module.zero_grad(set_to_none=True)
        return y_TD.detach().float(), x_TD.grad.float(), norm


def differences(
    layer: Layer, problem: Problem, expected: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, float, float]:
    """Return relative differences: of the worst token's output and gradient, and of the
    norm."""
    found = []
    for actual, value in zip(layer.results(problem), expected, strict=True):
        relative = (actual - value).norm(dim=-1) / value.norm(dim=-1)
        found.append(float(relative.max()))
    y, x_grad, norm = found
    return y, x_grad, norm


def dense(problem: Problem) -> Layer:
    """Build a dense layer of k times an expert's width: the same multiply-adds."""
    size = problem.size
    mlp = MLP(size.hidden, size.topk * size.width, problem.activation)
    mlp.to(problem.x_TD.device, problem.x_TD.dtype)
    return Layer(mlp, lambda x_TD: mlp(x_TD).y, mlp)


def ours(problem: Problem, backend: str = "auto", groups: Groups | None = None) -> Layer:
    """Build our layer, or this rank's part of it."""
    from megatron.moe.gate import create_gate
    from megatron.moe.layer import MoELayer

    size = problem.size
    gate = create_gate(
        "topk",
        hidden_size=size.hidden,
        num_experts=size.experts,
        topk=size.topk,
        norm_topk_prob=size.topk > 1,
    ).to(problem.x_TD.device)
    gate.router.weight.data.copy_(problem.router_ED)
    own = own_experts(size, groups)
    with torch.device("meta"):
        context = ExpertContext(
            len(own), size.hidden, size.width, problem.activation, backend=backend
        )
        experts = create_experts("mlp", context)
    for name, stack in (("w1", problem.w1_EHD), ("w2", problem.w2_EDH), ("w3", problem.w3_EHD)):
        if stack is not None:
            setattr(experts, name, nn.Parameter(stack[own.start : own.stop]))
    layer = MoELayer(gate, experts, size.experts, groups=groups)

    def forward(x_TD: Tensor) -> Tensor:
        layer.reset_step_state()
        return layer(x_TD).y

    return Layer(layer, forward, experts)


def own_experts(size: Size, groups: Groups | None) -> range:
    """Return the numbers of the experts that this rank holds."""
    if groups is None:
        return range(size.experts)
    local = size.experts // groups.ep_size
    return range(groups.ep_rank * local, (groups.ep_rank + 1) * local)


class ExpertLoop(nn.Module):
    """The simplest MoE layer: gather each expert's tokens, run it, add the weighted
    output."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.topk = problem.size.topk
        self.router = nn.Parameter(problem.router_ED.clone())
        self.experts = nn.ModuleList(
            problem.make_expert(e) for e in range(problem.size.experts)
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        logit_Tk, expert_Tk = F.linear(x_TD.float(), self.router).topk(self.topk, dim=-1)
        weight_Tk = logit_Tk.softmax(-1)
        y_TD = torch.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            token_n, choice_n = torch.where(expert_Tk == number)
            weight_n1 = weight_Tk[token_n, choice_n].unsqueeze(1).to(x_TD.dtype)
            y_TD.index_add_(0, token_n, expert(x_TD[token_n]).y * weight_n1)
        return y_TD


def expert_loop(problem: Problem) -> Layer:
    loop = ExpertLoop(problem)
    return Layer(loop, loop, loop.experts)


def deepspeed_moe(problem: Problem, groups: Groups | None = None) -> Layer:
    """Build DeepSpeed's native layer, or this rank's part of it.

    Nothing is dropped: every expert's buffer is as long as the fullest expert's.
    """
    from deepspeed.moe.layer import MoE

    class Expert(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).y

    groups = groups or distributed.init_distributed(1)
    size = problem.size
    moe = MoE(
        size.hidden,
        Expert(1, 1, problem.activation),
        size.experts,
        ep_size=groups.ep_size,
        k=size.topk,
        drop_tokens=False,
        min_capacity=0,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    moe.set_deepspeed_parallelism()
    inner = moe.deepspeed_moe
    inner.gate.wg.weight = nn.Parameter(problem.router_ED.clone())
    for number, expert in zip(
        own_experts(size, groups), inner.experts.deepspeed_experts, strict=True
    ):
        load_mlp(expert, problem.expert_weights(number))
    return Layer(moe, lambda x_TD: moe(x_TD)[0], inner.experts)


def transformers_block(problem: Problem, family: str, implementation: str) -> Layer:
    """Build the block of Mixtral or OLMoE in the dtype of the tokens, including its
    router."""
    from transformers import MixtralConfig, OlmoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    size = problem.size
    shape = {
        "hidden_size": size.hidden,
        "intermediate_size": size.width,
        "num_experts_per_tok": size.topk,
        "hidden_act": HIDDEN_ACT[problem.activation],
        "experts_implementation": implementation,
    }
    with torch.device("meta"):
        if family == "Mixtral":
            block = MixtralSparseMoeBlock(
                MixtralConfig(num_local_experts=size.experts, **shape)
            )
        else:
            block = OlmoeSparseMoeBlock(
                OlmoeConfig(num_experts=size.experts, norm_topk_prob=True, **shape)
            )
    block.gate.weight = nn.Parameter(problem.router_ED.to(problem.x_TD.dtype))
    block.experts.gate_up_proj = nn.Parameter(torch.cat([problem.w1_EHD, problem.w3_EHD], 1))
    block.experts.down_proj = nn.Parameter(problem.w2_EDH)
    return Layer(block, lambda x_TD: block(x_TD.unsqueeze(0)).squeeze(0), block.experts)


@dataclass(frozen=True)
class Candidate:
    """A layer that may be measured."""

    name: str
    make: Callable[[Problem], Layer]
    reason: str = ""
    """reason why it is not measured here; empty if it is"""


def candidates(size: Size, activation: str, device: torch.device) -> Iterator[Candidate]:
    """Yield our layer by backend, then all others."""
    native = "cpu" if device.type == "cpu" else "triton"
    for backend in ("auto", "reference", "grouped_mm", native):
        yield Candidate(f"ours, {backend}", partial(ours, backend=backend))
    yield Candidate("per-expert loop", expert_loop)
    yield Candidate("DeepSpeed MoE", deepspeed_moe)
    for family, implementation in transformers_names():
        yield Candidate(
            f"{family}, {implementation}",
            partial(transformers_block, family=family, implementation=implementation),
            why_not(implementation, size, activation, device),
        )


def transformers_names() -> list[tuple[str, str]]:
    """Return (family, implementation of its experts) for all that transformers
    registers.

    The experts of the two families are the same, their routers are not: the fastest
    implementation is measured with both. Ours is left out, which `hf_experts.py` measures.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = [name for name in ALL_EXPERTS_FUNCTIONS.valid_keys() if name != "moe_megatron"]
    return [
        ("Mixtral", "eager"),
        *(("Mixtral", name) for name in names),
        ("OLMoE", "grouped_mm"),
    ]


def why_not(implementation: str, size: Size, activation: str, device: torch.device) -> str:
    """Return why transformers' experts cannot be measured; empty if they can."""
    if activation not in HIDDEN_ACT:
        return f"its experts are gated, {activation} is not"
    if implementation in ("deepgemm", "sonicmoe"):
        return "its kernels are for CUDA and come from the network"
    if implementation == "batched_mm":
        # A copy of the weights per row, saved for the backward pass, and the gradient
        # of one of them.
        needed = 2 * size.tokens * size.topk * (3 + 2) * size.hidden * size.width
        available = memory(device)
        if needed > available:
            return (
                f"it needs {needed / 1e9:.0f} GB for copies of weights; "
                f"there are {available / 1e9:.0f}"
            )
    return ""


def memory(device: torch.device) -> int:
    """Return the bytes of memory of the machine, or of its GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bare_gemms(
    rows: list[int], hidden: int, width: int, gated: bool, like: Tensor
) -> Callable[[], None]:
    """Return a function that computes only the matrix products of feed-forward layers.

    It runs forward and backward without moving rows, allocating memory or computing
    activations.

    Args:
        rows: rows of each layer; a single layer of T rows is the dense layer.
    """
    total = sum(rows)
    groups = len(rows)
    x_SD, x_grad_SD, y_SD = (like.new_ones(total, hidden).split(rows) for _ in range(3))
    h_SH, a_SH = (like.new_ones(total, width).split(rows) for _ in range(2))
    up_GHD, up_grad_GHD = (like.new_ones(groups, width, hidden).unbind() for _ in range(2))
    down_GDH, down_grad_GDH = (like.new_ones(groups, hidden, width).unbind() for _ in range(2))
    layers = list(
        zip(
            x_SD,
            x_grad_SD,
            y_SD,
            h_SH,
            a_SH,
            up_GHD,
            up_grad_GHD,
            down_GDH,
            down_grad_GDH,
            strict=True,
        )
    )

    def step() -> None:
        for x, _, y, h, a, up, _, down, _ in layers:
            for _ in range(2 if gated else 1):
                torch.mm(x, up.T, out=h)
            torch.mm(a, down.T, out=y)
        for x, x_grad, y, h, a, up, up_grad, down, down_grad in layers:
            torch.mm(y.T, a, out=down_grad)
            torch.mm(y, down, out=h)
            for _ in range(2 if gated else 1):
                torch.mm(h.T, x, out=up_grad)
                torch.mm(h, up, out=x_grad)

    return step


def bare_grouped_mm(
    rows: list[int], hidden: int, width: int, gated: bool, like: Tensor
) -> Callable[[], None]:
    """Return a function that computes the products of `bare_gemms` by `F.grouped_mm`.

    It allocates its outputs, which `F.grouped_mm` cannot avoid.
    """
    offsets_E = torch.tensor(rows, device=like.device).cumsum(0, dtype=torch.int32)
    x_SD, y_grad_SD = (like.new_ones(sum(rows), hidden) for _ in range(2))
    a_SH, h_grad_SH = (like.new_ones(sum(rows), width) for _ in range(2))
    up_EDH = like.new_ones(len(rows), width, hidden).transpose(1, 2)
    down_EHD = like.new_ones(len(rows), hidden, width).transpose(1, 2)
    for leaf in (x_SD, a_SH, up_EDH, down_EHD):
        leaf.requires_grad_()
    products = [(x_SD, up_EDH, h_grad_SH)] * (2 if gated else 1)
    products.append((a_SH, down_EHD, y_grad_SD))

    def step() -> None:
        for rows_S, weight_E, grad_S in products:
            out_S = F.grouped_mm(rows_S, weight_E, offs=offsets_E)
            torch.autograd.grad(out_S, (rows_S, weight_E), grad_S)

    return step


def loads(problem: Problem) -> list[int]:
    """Return the number of rows of each expert."""
    logits_TE = problem.x_TD.float() @ problem.router_ED.T
    chosen_Tk = logits_TE.topk(problem.size.topk, dim=-1).indices
    return torch.bincount(chosen_Tk.flatten(), minlength=problem.size.experts).tolist()
