"""The decoder-only transformer: embeddings, blocks, final norm, output layer and loss.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary (padded), N tokens of a batch (B x S).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron.config.schema import ModelConfig, require
from megatron.model.attention import document_mask
from megatron.model.block import Block
from megatron.model.cross_entropy import linear_cross_entropy
from megatron.model.norm import build_norm
from megatron.model.rotary import Rotary
from megatron.moe.ffn import FFNContext


class GPTOutput(NamedTuple):
    """What a forward pass returns. Losses are 0-d fp32; without labels there are logits instead.

    A tuple, because ZeRO 3's hooks find the tensors of a module's output in tuples, lists and
    dicts only. The language-model loss is a sum and its normalizer: how the sums of several
    micro-batches and ranks are averaged is the training task's decision.
    """

    lm_loss_sum: Tensor | None
    """cross-entropy summed over the tokens, weighted by the loss mask"""
    num_target_tokens: Tensor | None
    """sum of the loss mask"""
    aux_loss: Tensor
    """mean of the auxiliary losses of the MoE layers; 0 without any"""
    logits: Tensor | None
    """[B, S, V] in the compute dtype"""

    @property
    def lm_loss(self) -> Tensor | None:
        """Mean cross-entropy over the target tokens of this batch; 0 if it has none."""
        if self.lm_loss_sum is None:
            return None
        return self.lm_loss_sum / at_least_one(self.num_target_tokens)

    @property
    def loss(self) -> Tensor | None:
        """lm_loss + aux_loss."""
        if self.lm_loss_sum is None:
            return None
        return self.lm_loss + self.aux_loss


def at_least_one(count: Tensor) -> Tensor:
    """A normalizer to divide by: 1 where there is nothing to average."""
    return torch.where(count > 0, count, 1)


def project(
    x: Tensor, weight_VD: Tensor, labels_N: Tensor | None, mask_N: Tensor | None
) -> Tensor:
    """[..., D] -> logits [..., V]; with labels, [N, D] -> the sum of `linear_cross_entropy`, 0-d."""
    return (
        F.linear(x, weight_VD)
        if labels_N is None
        else linear_cross_entropy(x, weight_VD, labels_N, mask_N)
    )


class OutputLayer(nn.Linear):
    """From hidden states to the vocabulary, or all the way to the loss, as `project`."""

    def forward(
        self, x: Tensor, labels_N: Tensor | None = None, mask_N: Tensor | None = None
    ) -> Tensor:
        return project(x, self.weight, labels_N, mask_N)


class TokenEmbedding(nn.Embedding):
    """The vocabulary's table, which also serves as the output layer when the two are tied."""

    def forward(
        self,
        x: Tensor,
        as_output: bool = False,
        labels_N: Tensor | None = None,
        mask_N: Tensor | None = None,
    ) -> Tensor:
        """Ids [...] -> rows [..., D]; as the output layer, the same as `OutputLayer`.

        Both go through this module's call, not through its bare weight: ZeRO 3 gathers a sharded weight when the
        module that owns it is called, forward and backward.
        """
        return project(x, self.weight, labels_N, mask_N) if as_output else super().forward(x)


class GPT(nn.Module):
    """A transformer whose feed-forward layers come from outside, so that it knows no gates.

    Args:
        vocab_size: V, padded already.
        make_ffn: the feed-forward layer of block `i` (from 0), `(x_BSD, FFNContext) -> FFNOutput`.
        recompute: in training, keep only block inputs and run blocks again in the backward pass.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        *,
        make_ffn: Callable[[int], nn.Module],
        recompute: bool = False,
    ):
        super().__init__()
        self.config, self.vocab_size, self.recompute = model, vocab_size, recompute
        self.embed_tokens = TokenEmbedding(vocab_size, model.hidden_size)
        self.embed_positions = self.rotary = None
        if model.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(model.max_positions, model.hidden_size)
        else:
            self.rotary = Rotary(model.head_size, model.max_positions, model.rotary_base)
        self.layers = nn.ModuleList(Block(model, make_ffn(i)) for i in range(model.num_layers))
        self.norm = build_norm(model)
        if model.untie_embeddings_and_output_weights:
            self.lm_head = OutputLayer(model.hidden_size, vocab_size, bias=False)

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        loss_mask_BS: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
        progress: float = 0.0,
    ) -> GPTOutput:
        """Predict the token after each position.

        Args:
            tokens_BS: int64 ids.
            labels_BS: the tokens to predict; None: return logits and no loss.
            loss_mask_BS: weight of each token in the mean; None: all 1.
            position_ids_BS: int64; None: 0 .. S - 1.
            segments_BS: number of each token's document, which attention does not leave; None: one document.
            progress: share of the training that is done, for gates that change over time.
        Raises:
            ValueError: the sequence is longer than the model's largest position.
        """
        length, limit = tokens_BS.shape[1], self.config.max_positions
        require(
            length <= limit,
            "sequence length",
            length,
            f"1 to {limit} positions",
            "Cut the sequence or train with a larger --max-position-embeddings.",
        )
        h_BSD = self._embed(tokens_BS, position_ids_BS)
        rotation = self.rotary(length, position_ids_BS) if self.rotary is not None else None
        mask_B1SS = None if segments_BS is None else document_mask(segments_BS)
        carry, aux_losses = None, []
        for block in self.layers:
            h_BSD, aux_loss, new_carry = self._run(
                block, h_BSD, rotation, mask_B1SS, FFNContext(tokens_BS, carry, progress)
            )
            if aux_loss is not None:
                aux_losses.append(aux_loss)
                carry = new_carry
        aux_loss = (
            torch.stack(aux_losses).mean()
            if aux_losses
            else h_BSD.new_zeros((), dtype=torch.float32)
        )
        output = (
            self.lm_head
            if self.config.untie_embeddings_and_output_weights
            else partial(self.embed_tokens, as_output=True)
        )
        h_BSD = self.norm(h_BSD)
        if labels_BS is None:
            return GPTOutput(None, None, aux_loss, output(h_BSD))
        mask_N = (
            torch.ones(labels_BS.numel(), device=h_BSD.device)
            if loss_mask_BS is None
            else loss_mask_BS.flatten().float()
        )
        loss_sum = output(h_BSD.flatten(0, 1), labels_N=labels_BS.flatten(), mask_N=mask_N)
        return GPTOutput(loss_sum, mask_N.sum(), aux_loss, None)

    def _embed(self, tokens_BS: Tensor, position_ids_BS: Tensor | None) -> Tensor:
        h_BSD = self.embed_tokens(tokens_BS)
        if self.embed_positions is not None:
            if position_ids_BS is None:
                position_ids_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[
                    None
                ]
            h_BSD = h_BSD + self.embed_positions(position_ids_BS)
        return F.dropout(h_BSD, self.config.hidden_dropout, self.training)

    def _run(self, block: Block, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(
                block, *args, use_reentrant=False, context_fn=block.recompute_contexts
            )
        return block(*args)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the initial weights: N(0, init_method_std), output projections divided by sqrt(2 x layers).

        Each parameter has its own generator, seeded by (seed, its name), so that a weight depends neither on the
        other modules nor on how experts are sharded. What lies under a module with `initialises_itself` is left alone.
        """
        std, output_std = (
            self.config.init_method_std,
            self.config.init_method_std / math.sqrt(2 * len(self.layers)),
        )
        for name, module in _uninitialised(self):
            if isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()
                continue
            for key, parameter in module.named_parameters(recurse=False):
                generator = torch.Generator().manual_seed(
                    zlib.crc32(f"{seed}.{name}.{key}".encode())
                )
                scaled = name.endswith(("o_proj", "down_proj"))
                values = torch.empty(parameter.shape).normal_(
                    0, output_std if scaled else std, generator=generator
                )
                parameter.copy_(values)


def _uninitialised(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if getattr(module, "initialises_itself", False):
        return
    yield prefix, module
    for name, child in module.named_children():
        yield from _uninitialised(child, f"{prefix}.{name}" if prefix else name)
