"""The decoder-only transformer: embeddings, blocks, final norm, output layer and loss.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary (padded), N = B x S tokens.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.attention import AttentionConfig
from megatron.config.fields import require
from megatron.config.model import ModelConfig
from megatron.config.rotary import RotaryConfig
from megatron.model.attention_context import AttentionCache, AttentionContext
from megatron.model.block import Block, run_blocks
from megatron.model.cross_entropy import linear_cross_entropy
from megatron.model.document_attention import DocumentLayout
from megatron.model.norm import build_norm
from megatron.model.rotary import build_rotary
from megatron.moe.ffn import FFNContext, TokenLayout
from megatron.moe.losses import reduce_over_layers

_INITIALLY_ZERO = ("bias", "sinks")
"""Names of parameters that start at zero"""


class GPTOutput(NamedTuple):
    """Output of a forward pass: 0-d fp32 losses, or logits when no labels were given.

    A tuple, because ZeRO 3's hooks find the tensors of a module's output in tuples, lists and
    dicts only. The language-model loss is a sum and its normalizer: how the sums of several
    micro-batches and ranks are averaged is the training task's decision.
    """

    lm_loss_sum: Tensor | None
    """Sum of the tokens' cross-entropies, weighted by the loss mask"""
    num_target_tokens: Tensor | None
    """Sum of the loss mask"""
    aux_loss: Tensor
    """Sum of the auxiliary losses of the MoE layers, or their mean with `aux_loss_reduction`
    "mean"; 0 without any"""
    logits: Tensor | None
    """Logits [B, S, V] in the compute dtype"""

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
    """Return `count` as a divisor: 1 where there is nothing to average."""
    return torch.where(count > 0, count, 1)


def target_mask(
    labels_BS: Tensor, loss_mask_BS: Tensor | None, padding_BS: Tensor | None
) -> Tensor:
    """Return the weight of each position in the loss, fp32: 0 for padding."""
    if loss_mask_BS is None:
        mask_BS = torch.ones(labels_BS.shape, device=labels_BS.device)
    else:
        mask_BS = loss_mask_BS.float()
    if padding_BS is not None:
        mask_BS = mask_BS.masked_fill(padding_BS, 0.0)
    return mask_BS


def _check_padding(padding_BS: Tensor | None, tokens_BS: Tensor) -> None:
    if padding_BS is None:
        return
    require(
        padding_BS.shape == tokens_BS.shape and padding_BS.dtype == torch.bool,
        "padding_BS",
        f"{padding_BS.dtype} {list(padding_BS.shape)}",
        f"torch.bool {list(tokens_BS.shape)}, the shape of the tokens",
    )


def _tokens_at(h_BSD: Tensor, index_BK: Tensor | None) -> Tensor:
    """Return the hidden states of some tokens of each row [B, K, D]; without indices, all."""
    if index_BK is None:
        return h_BSD
    return h_BSD[torch.arange(len(h_BSD), device=h_BSD.device)[:, None], index_BK]


def token_layout(padding_BS: Tensor | None, documents: DocumentLayout | None) -> TokenLayout:
    """Return what MoE layers need to know of padding and documents."""
    if documents is None:
        return TokenLayout(padding_BS)
    return TokenLayout(padding_BS, documents.document_BS, len(documents.starts_N))


def project(
    x: Tensor, weight_VD: Tensor, labels_N: Tensor | None, mask_N: Tensor | None
) -> Tensor:
    """Apply the output layer.

    Returns:
        Without labels the logits, [..., D] -> [..., V]; with labels the summed cross-entropy
        of `linear_cross_entropy`, [N, D] -> 0-d.
    """
    if labels_N is None:
        return F.linear(x, weight_VD)
    return linear_cross_entropy(x, weight_VD, labels_N, mask_N)


class OutputLayer(nn.Linear):
    """Projection of hidden states to logits or to the loss; see `project`."""

    def forward(
        self, x: Tensor, labels_N: Tensor | None = None, mask_N: Tensor | None = None
    ) -> Tensor:
        """Apply `project` with the layer's own weight."""
        return project(x, self.weight, labels_N, mask_N)


class TokenEmbedding(nn.Embedding):
    """Token embedding table, which is also the output layer when the weights are tied."""

    def forward(
        self,
        x: Tensor,
        as_output: bool = False,
        labels_N: Tensor | None = None,
        mask_N: Tensor | None = None,
    ) -> Tensor:
        """Look up ids [...] -> [..., D]; with `as_output`, apply `project` to hidden states.

        Both uses call this module instead of reading its weight: ZeRO 3 gathers a sharded
        weight when the module that owns it is called, in forward and backward.
        """
        if as_output:
            return project(x, self.weight, labels_N, mask_N)
        return super().forward(x)


class GPT(nn.Module):
    """A decoder-only transformer. Its feed-forward layers are passed in: it knows no gates.

    Args:
        model: shape of the model.
        vocab_size: V, already padded.
        make_ffn: returns the feed-forward layer of block `i`, counted from 0:
            `(x_BSD, FFNContext) -> FFNOutput`.
        recompute: activation recomputation: in training, store only the inputs of blocks and
            run their forward pass again during the backward pass.
        aux_loss_reduction: "sum" or "mean" of the auxiliary losses over MoE layers.
        attention: options of the attention layers; None: the defaults.
        rotary: options of rotary positions; None: the defaults.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        *,
        make_ffn: Callable[[int], nn.Module],
        recompute: bool = False,
        aux_loss_reduction: str = "sum",
        attention: AttentionConfig | None = None,
        rotary: RotaryConfig | None = None,
    ):
        super().__init__()
        attention = attention or AttentionConfig()
        rotary = rotary or RotaryConfig()
        self.config = model
        self.aux_loss_reduction = aux_loss_reduction
        self.vocab_size = vocab_size
        self.recompute = recompute
        self.embed_tokens = TokenEmbedding(vocab_size, model.hidden_size)
        self.embed_positions = None
        self.rotary = None
        if model.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(model.max_positions, model.hidden_size)
        else:
            self.rotary = build_rotary(model, rotary, attention.rotary_head_size(model))
        self.layers = nn.ModuleList()
        for i in range(model.num_layers):
            self.layers.append(Block(model, make_ffn(i), attention, rotary, i))
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
        padding_BS: Tensor | None = None,
        progress: float = 0.0,
        independent_sequences: bool = False,
        cache: AttentionCache | None = None,
        logits_at_BK: Tensor | None = None,
    ) -> GPTOutput:
        """Predict the token after each position.

        Args:
            tokens_BS: token ids, int64.
            labels_BS: the tokens to predict; None: return logits and no loss.
            loss_mask_BS: weight of each token in the loss; None: 1 for all tokens.
            position_ids_BS: positions, int64; None: 0 .. S - 1, or with a cache the slots of
                the tokens in it.
            segments_BS: number of each token's document, which limits attention to it:
                neighbours with equal numbers are in one document; None: each sequence is one.
                Balance losses of scope sequence count per document.
            padding_BS: bool, True where a position is padding, which is not routed and has no
                loss. Attention does not know it: padding follows the tokens of its sequence or
                has a segment of its own. None: no padding.
            progress: completed fraction of the training, for gates that change over time.
            independent_sequences: see `FFNContext`.
            cache: attention states of earlier tokens, to which those of these tokens are
                added. It knows of padding anywhere in a row. None: no earlier tokens.
            logits_at_BK: indices of the tokens of each row that get logits [B, K, V]; None: all.
        Raises:
            ValueError: the sequence is longer than the model has positions, or the padding has
                another shape than the tokens.
        """
        assert cache is None or segments_BS is None, "cached attention knows no documents"
        length = tokens_BS.shape[1]
        if cache is not None and position_ids_BS is None:
            position_ids_BS = cache.slot_BS
            length = int(position_ids_BS.max()) + 1
        self._check_length(length)
        _check_padding(padding_BS, tokens_BS)
        h_BSD = self._embed(tokens_BS, position_ids_BS)
        documents = None if segments_BS is None else DocumentLayout(segments_BS)
        context = FFNContext(
            tokens_BS,
            progress=progress,
            layout=token_layout(padding_BS, documents),
            independent_sequences=independent_sequences,
        )
        attention = self._attention_context(tokens_BS.shape[1], position_ids_BS, documents)
        h_BSD, aux_loss = self._run_blocks(h_BSD, attention, context, cache)
        h_BSD = self.norm(h_BSD)
        if labels_BS is None:
            logits_BSV = self._output(_tokens_at(h_BSD, logits_at_BK))
            return GPTOutput(None, None, aux_loss, logits_BSV)
        mask_BS = target_mask(labels_BS, loss_mask_BS, padding_BS)
        return self._loss_output(h_BSD, labels_BS, mask_BS, aux_loss)

    def _loss_output(
        self, h_BSD: Tensor, labels_BS: Tensor, mask_BS: Tensor, aux_loss: Tensor
    ) -> GPTOutput:
        mask_N = mask_BS.flatten()
        loss_sum = self._output(
            h_BSD.flatten(0, 1), labels_N=labels_BS.flatten(), mask_N=mask_N
        )
        return GPTOutput(loss_sum, mask_N.sum(), aux_loss, None)

    def _check_length(self, length: int) -> None:
        limit = self.config.max_positions
        require(
            length <= limit,
            "sequence length",
            length,
            f"1 to {limit} positions",
            "Cut the sequence or train with a larger --max-position-embeddings.",
        )

    def _embed(self, tokens_BS: Tensor, position_ids_BS: Tensor | None) -> Tensor:
        h_BSD = self.embed_tokens(tokens_BS)
        if self.embed_positions is not None:
            if position_ids_BS is None:
                positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
                position_ids_BS = positions_S[None]
            h_BSD = h_BSD + self.embed_positions(position_ids_BS)
        return F.dropout(h_BSD, self.config.hidden_dropout, self.training)

    def _attention_context(
        self, length: int, position_ids_BS: Tensor | None, documents: DocumentLayout | None
    ) -> AttentionContext:
        """Return what all attention layers get, without caches."""
        if self.rotary is None:
            return AttentionContext(documents=documents)
        return AttentionContext(self.rotary(length, position_ids_BS), documents)

    def _run_blocks(
        self,
        h_BSD: Tensor,
        attention: AttentionContext,
        context: FFNContext,
        cache: AttentionCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Run all blocks.

        Returns:
            The residual stream, and the reduced auxiliary loss of the MoE layers.
        """
        recompute = self.recompute and self.training
        h_BSD, aux_losses = run_blocks(
            self.layers, h_BSD, attention, context, cache, recompute=recompute
        )
        if not aux_losses:
            return h_BSD, h_BSD.new_zeros((), dtype=torch.float32)
        return h_BSD, reduce_over_layers(torch.stack(aux_losses), self.aux_loss_reduction)

    @property
    def _output(self) -> Callable[..., Tensor]:
        """The output layer, which may share its weight with the token embedding."""
        if self.config.untie_embeddings_and_output_weights:
            return self.lm_head
        return partial(self.embed_tokens, as_output=True)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the initial weights from N(0, init_method_std); biases are 0.

        The standard deviation of output projections is divided by sqrt(2 x layers). Each
        parameter has its own generator, seeded by (seed, its name), so that a weight depends
        neither on the other modules nor on how experts are sharded. Modules with
        `initialises_itself` and everything below them are skipped.
        """
        std = self.config.init_method_std
        output_std = std / math.sqrt(2 * len(self.layers))
        for name, module in _modules_to_initialise(self):
            if isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.reset_parameters()
                continue
            is_output = name.endswith(("o_proj", "down_proj", "fc2_latent_proj"))
            for key, parameter in module.named_parameters(recurse=False):
                if key in _INITIALLY_ZERO:
                    parameter.zero_()
                    continue
                parameter_seed = zlib.crc32(f"{seed}.{name}.{key}".encode())
                generator = torch.Generator().manual_seed(parameter_seed)
                values = torch.empty(parameter.shape)
                values.normal_(0, output_std if is_output else std, generator=generator)
                parameter.copy_(values)


def _modules_to_initialise(
    module: nn.Module, prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of all modules that are not below one with `initialises_itself`."""
    if getattr(module, "initialises_itself", False):
        return
    yield prefix, module
    for name, child in module.named_children():
        child_prefix = f"{prefix}.{name}" if prefix else name
        yield from _modules_to_initialise(child, child_prefix)
