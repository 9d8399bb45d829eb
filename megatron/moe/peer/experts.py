"""PEER's experts: single neurons, or MLPs of a few hidden units, as rows of tables.

Shape suffixes: T tokens, D hidden, A assignments of a token to an expert, N_local
experts on this rank, W hidden units of one expert.

    y_t = sum over the assignments a of token t:
              weight_a * sum_j act(w_in[e_a, j] . x_t) * w_out[e_a, j]

Grouped matrix products do not pay off when an expert sees a token or two. The memory to
avoid is a copy of the rows of all A x W pairs, over a hundred times as many as tokens.
So `megatron.moe.peer.lookup` reads the rows in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.config.fields import require
from megatron.config.schema import ACTIVATIONS
from megatron.moe.experts import backends
from megatron.moe.experts.activations import activate, is_gated
from megatron.moe.experts.expert_init import ExpertInit
from megatron.moe.peer import lookup
from megatron.moe.peer.lookup import PairDots, PairOps, TokenExpertPairs, WeightedRowSum

_MAX_BLOCKS = 192
"""Largest number of blocks. 192 = 64 x 3 blocks are distributed evenly over 2, 3, 4, 6,
8, ... ranks."""
_PEER_BACKENDS = ("auto", "reference", "triton")
"""Values of `--moe-backend` for PEER. The other backends are grouped matrix
products."""


def number_of_blocks(num_experts: int) -> int:
    """Return the number of stacked blocks that hold the experts, whatever the sharding.

    Blocks are PEER's unit of expert parallelism: no block is split between ranks, and
    checkpoints count and shard blocks as they do the experts of other gates. The number
    depends on the number of experts only, so that a checkpoint loads at any
    expert-parallel size.
    """
    if num_experts <= _MAX_BLOCKS:
        return num_experts
    return math.gcd(num_experts, _MAX_BLOCKS)


class PEERExperts(nn.Module):
    """PEER experts of one rank: one row [D] per table, expert and hidden unit.

    `w_in` [N_local, W, D] and, for swiglu and geglu, `w_up` [N_local, W, D] read the
    token; `w_out` [N_local, W, D] writes one row per hidden unit (MLPExperts.w2
    transposed). They are views of the parameters w1, w3 and w2, which are stacks of
    blocks, [blocks here, experts of a block x W, D]: DeepSpeed's expert parallelism and
    the checkpoint format count stacked experts, and a million of them would be one row
    each. Each block's weights are drawn from its own generator, so they do not depend
    on how experts are sharded.

    Source: PEER (He 2024, "Mixture of A Million Experts"), where w_in is u and w_out v,
    and width > 1 an MLP.

    Args:
        num_experts: number of experts over all ranks.
        num_local: number of experts on this rank.
        width: hidden units of one expert.
        activation: a name of `megatron.moe.experts.activations`.
        init: seed and distribution of the initial weights; `init_std` is of w_in and
            w_up, `output_std` of w_out.
        sparse_gradients: make the tables' gradients sparse tensors of the used rows,
            sorted and coalesced, as torch.optim.SparseAdam takes them. DeepSpeed's ZeRO
            needs dense ones.
        backend: reference (torch's operations), triton, or auto; see
            `choose_peer_backend`.
    Raises:
        ValueError: unknown activation or backend, or blocks that cannot be distributed
            evenly over the ranks.
    """

    initialises_itself = True

    def __init__(
        self,
        num_experts: int,
        num_local: int,
        hidden_size: int,
        width: int,
        activation: str,
        *,
        init: ExpertInit | None = None,
        sparse_gradients: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        require(activation in ACTIVATIONS, "activation", activation, " ".join(ACTIVATIONS))
        self.num_blocks = number_of_blocks(num_experts)
        ranks = num_experts // num_local
        require(
            self.num_blocks % ranks == 0,
            "--moe-expert-parallel-size",
            ranks,
            f"a divisor of {self.num_blocks}, the number of blocks that {num_experts} "
            "experts are stored in",
        )
        _check_backend(backend)
        self.num_local = num_local
        self.width = width
        self.activation = activation
        self.sparse_gradients = sparse_gradients
        self.backend = backend
        per_block = num_experts // self.num_blocks
        shape = (num_local // per_block, per_block * width, hidden_size)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))
        if is_gated(activation):
            self.w3 = nn.Parameter(torch.empty(shape))
        if not self.w1.is_meta:
            self._draw_weights(init or ExpertInit(), per_block)

    @torch.no_grad()
    def _draw_weights(self, init: ExpertInit, per_block: int) -> None:
        """Draw each block of each table from its own generator."""
        stds = {"w1": init.init_std, "w2": init.output_std, "w3": init.init_std}
        first_block = init.first_expert // per_block
        for table, (name, stack) in enumerate(self.named_parameters()):
            for block, rows in enumerate(stack.data, first_block):
                seed = _block_seed(init.seed, init.layer, table, block)
                rows.normal_(0, stds[name], generator=torch.Generator().manual_seed(seed))

    @property
    def w_in(self) -> Tensor:
        """Input weights, a view [N_local, W, D] of w1."""
        return self.w1.view(self.num_local, self.width, -1)

    @property
    def w_out(self) -> Tensor:
        """Output weights, a view [N_local, W, D] of w2."""
        return self.w2.view(self.num_local, self.width, -1)

    @property
    def w_up(self) -> Tensor | None:
        """Up-projection weights, a view [N_local, W, D] of w3; None without gating."""
        if not is_gated(self.activation):
            return None
        return self.w3.view(self.num_local, self.width, -1)

    def forward(
        self, x_TD: Tensor, token_A: Tensor, expert_A: Tensor, weight_A: Tensor
    ) -> Tensor:
        """Compute the weighted sum of each token's experts.

        The list of assignments may be empty and in any order, and repeats add up.

        Args:
            x_TD: token rows; products are taken in the tables' dtype and summed in
                fp32.
            token_A: int64 in [0, T).
            expert_A: int64 in [0, N_local).
            weight_A: fp32.
        Returns:
            [T, D] in the dtype of x; deterministic.
        """
        ops = self._pair_ops()
        rows_TD = x_TD.to(self.w1.dtype).contiguous()
        pairs = TokenExpertPairs.of(token_A, expert_A, len(x_TD), self.num_local, self.width)
        stacks = [self.w1, self.w3] if is_gated(self.activation) else [self.w1]
        hidden = [
            PairDots.apply(rows_TD, stack, ops, *pairs).view(-1, self.width) for stack in stacks
        ]
        scale_AW = activate(self.activation, *hidden) * weight_A.unsqueeze(1)
        return WeightedRowSum.apply(self.w2, scale_AW.flatten(), ops, *pairs).to(x_TD.dtype)

    def _pair_ops(self) -> PairOps:
        if self._uses_triton():
            dots, segment_sum = _triton_kernels()
        else:
            dots = lookup.embedding_dots
            segment_sum = lookup.segment_sum_in_reused_memory
        return PairOps(dots, segment_sum, self.sparse_gradients)

    def _uses_triton(self) -> bool:
        backend, _ = choose_peer_backend(self.backend, self.w1.device.type, self.w1.dtype)
        return backend == "triton"


def choose_peer_backend(requested: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """Choose the backend for tables of this dtype on this type of device.

    Returns:
        ("reference" or "triton", the reason).
    Raises:
        ValueError: unknown backend, or one that is not possible here.
    """
    _check_backend(requested)
    name, reason = backends.choose_expert_backend(requested, device, dtype)
    if name == "triton":
        return name, reason
    return "reference", "torch's own operations on tables"


def _check_backend(backend: str) -> None:
    """Raise ValueError for a backend that PEER does not have."""
    require(
        backend in _PEER_BACKENDS,
        "--moe-backend",
        backend,
        f"{' '.join(_PEER_BACKENDS)} for PEER's tables",
    )


def _triton_kernels() -> tuple[Callable, Callable]:
    """Import the kernels on first use: Triton is optional."""
    from megatron.moe.experts.triton_combine import weighted_combine
    from megatron.moe.peer.triton_lookup import triton_dots

    return triton_dots, weighted_combine


def _block_seed(seed: int, layer: int, table: int, block: int) -> int:
    """Return a seed that differs between all blocks of a model in its low 32 bits.

    torch's CPU generator uses only those.
    """
    return (
        (((seed * 1_000_003 + layer) * 65_537 + block) * 3 + table + 1) * 2_654_435_761 % 2**63
    )
