"""Any of our models in transformers, whatever its gates, experts and attention.

    import megatron.interop.hf_model
    model = AutoModelForCausalLM.from_pretrained(folder)

Importing this module registers the classes with transformers' auto classes (and our experts with
its experts implementations), so that no code of the folder is executed. The blocks are those of
training. In evaluation mode no sequence depends on others: there is no capacity limit, and gates
that look at other tokens see one sequence at a time.

Shape suffixes: B batch, S new tokens, D hidden, V vocabulary (padded), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.checkpoint.gate_code import (
    describe_expert_types,
    describe_gates,
    warn_of_changed_gates,
)
from megatron.config.fields import require
from megatron.interop.hf.families.moe_megatron import MODEL_TYPE, require_gates
from megatron.interop.hf_cache import place_tokens
from megatron.interop.hf_config import MoEMegatronConfig
from megatron.interop.hf_experts import register_experts
from megatron.interop.router_logits import RouterLogits
from megatron.model.attention_context import AttentionContext
from megatron.model.block import Block, run_blocks
from megatron.model.builder import build_run_config_model
from megatron.model.document_attention import DocumentLayout
from megatron.model.gpt import GPT, token_layout
from megatron.model.meta_device import meta_device
from megatron.model.precision import cast_parameters
from megatron.model.rotary import Rotary, Rotation
from megatron.moe.ffn import FFNContext
from megatron.moe.layer_sums import find_moe_layers
from megatron.moe.losses import reduce_over_layers
from megatron.optional_packages import import_optional

_NEEDED_BY = "megatron.interop.hf_model"
_transformers = import_optional("transformers", "hf", _NEEDED_BY)
_cache_utils = import_optional("transformers.cache_utils", "hf", _NEEDED_BY)
_outputs = import_optional("transformers.modeling_outputs", "hf", _NEEDED_BY)
_capturing = import_optional("transformers.utils.output_capturing", "hf", _NEEDED_BY)


@dataclass
class MoEMegatronModelOutput(_outputs.MoeModelOutputWithPast):
    """Output of the model without its output layer."""

    aux_loss: Tensor | None = None
    """auxiliary loss of the gates, coefficients applied"""


def build_gpt(config: MoEMegatronConfig) -> GPT:
    """Build the model of a config, with new weights in the default dtype of torch; gates in fp32.

    Raises:
        ValueError: a gate is not imported, or refuses its options.
    """
    require_gates(config.gates, config.name_or_path or "config.json")
    run = config.run_config
    warn_of_changed_gates(config.gates, describe_gates(run))
    warn_of_changed_gates(config.expert_types, describe_expert_types(run), "expert type")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        if torch.empty(0).is_meta:
            with meta_device():
                gpt = build_run_config_model(run, run.model.vocab_size)
        else:
            gpt = build_run_config_model(run, run.model.vocab_size)
    finally:
        torch.set_default_dtype(dtype)
    cast_parameters(gpt, dtype)
    return gpt


class MoEMegatronPreTrainedModel(_transformers.PreTrainedModel):
    """What both classes have in common: loading, casting and recording."""

    config: MoEMegatronConfig
    config_class = MoEMegatronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_record_outputs = {
        "router_logits": _capturing.OutputRecorder(RouterLogits, index=0),
        "hidden_states": _capturing.OutputRecorder(Block, index=0),
    }

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model; see `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: a tensor of the model is missing, has another shape, or is unknown.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            found = sorted(map(str, info[kind]))
            what = f"{kind} of {model.name_or_path}"
            require(
                not found, what, found, "none", "The folder is not that of its config.json."
            )
        return (model, info) if wants_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Compute what a checkpoint does not store, and draw weights of added tokens."""
        if isinstance(module, Rotary):
            module.to(module.cos_PR.device)
            return
        is_new = isinstance(module, nn.Embedding | nn.Linear)
        if is_new and not getattr(module.weight, "_is_hf_initialized", False):
            module.weight.normal_(0, self.config.initializer_range)


class MoEMegatronModel(MoEMegatronPreTrainedModel):
    """Embeddings, blocks and final norm of a `GPT`.

    Args:
        gpt: whose modules are taken; None: built from the config.
    """

    _keys_to_ignore_on_load_unexpected = ["lm_head"]

    def __init__(self, config: MoEMegatronConfig, gpt: GPT | None = None):
        super().__init__(config)
        if gpt is None:
            gpt = build_gpt(config)
        self.embed_tokens = gpt.embed_tokens
        self.embed_positions = gpt.embed_positions
        self.rotary = gpt.rotary
        self.layers = gpt.layers
        self.norm = gpt.norm
        self.gradient_checkpointing = False
        for moe_layer in find_moe_layers(self.layers):
            moe_layer.router_logits = RouterLogits()
        _mark_initialized(self)
        self.post_init()

    @_capturing.capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        progress: float = 1.0,
        **kwargs: Any,
    ) -> MoEMegatronModelOutput:
        """Run the blocks.

        Args:
            input_ids: token ids [B, S], int64.
            attention_mask: [B, tokens so far], 0 where a token is padding, on either side.
                Padding is not routed. None: no padding.
            position_ids: positions [B, S]; None: those of the tokens that are not padding.
                Positions that start again begin a new document, which sees itself only, where
                there is neither mask nor cache.
            past_key_values: a `transformers.Cache` with earlier tokens, to which these are added.
            inputs_embeds: [B, S, D] instead of token ids.
            use_cache: return a cache; None: as the config says, and never in training.
            progress: completed fraction of the training, for gates that change over time.
        Raises:
            ValueError: inputs are missing, too long, or do not fit each other.
        """
        h_BSD = self._embed(input_ids, inputs_embeds)
        recompute = self.gradient_checkpointing and self.training
        past_key_values = self._cache(past_key_values, use_cache, recompute)
        shape = h_BSD.shape[:2]
        placement = place_tokens(shape, h_BSD.device, attention_mask, past_key_values)
        documents = None
        if position_ids is None:
            position_ids = placement.position_BS
        elif placement.cache is None and placement.padding_BS is None:
            documents = _packed_documents(position_ids.expand(shape))
        self._check_positions(shape[1], position_ids)
        h_BSD = self._add_positions(h_BSD, position_ids)
        context = FFNContext(
            input_ids,
            progress=progress,
            layout=token_layout(placement.padding_BS, documents),
            independent_sequences=not self.training,
        )
        h_BSD, aux_losses = run_blocks(
            self.layers,
            h_BSD,
            AttentionContext(self._rotation(shape[1], position_ids), documents),
            context,
            placement.cache,
            recompute=recompute,
        )
        return MoEMegatronModelOutput(
            last_hidden_state=self.norm(h_BSD),
            past_key_values=past_key_values,
            aux_loss=self._reduce(aux_losses),
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        given = [name for name, value in _named(input_ids, inputs_embeds) if value is not None]
        require(len(given) == 1, "the given inputs", given, "input_ids or inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        return self.embed_tokens(input_ids)

    def _cache(self, cache: Any, use_cache: bool | None, recompute: bool) -> Any:
        """Return the cache of a forward pass; None: there is none."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        require(
            not recompute or cache is None,
            "past_key_values",
            type(cache).__name__,
            "None with activation checkpointing, whose second pass would add the tokens again",
        )
        if cache is None and use_cache and not recompute:
            cache = _cache_utils.DynamicCache(config=self.config)
        return cache

    def _check_positions(self, length: int, position_ids: Tensor | None) -> None:
        """Raise ValueError for positions that the model does not have."""
        last = length - 1 if position_ids is None else int(position_ids.max())
        limit = self.config.max_position_embeddings
        require(last < limit, "the last position", last, f"0 to {limit - 1}")

    def _add_positions(self, h_BSD: Tensor, position_ids: Tensor | None) -> Tensor:
        """Add learned positions, if the model has them, and apply dropout."""
        if self.embed_positions is not None:
            if position_ids is None:
                position_ids = torch.arange(h_BSD.shape[1], device=h_BSD.device)[None]
            h_BSD = h_BSD + self.embed_positions(position_ids)
        dropout = self.config.run_config.model.hidden_dropout
        return F.dropout(h_BSD, dropout, self.training)

    def _rotation(self, length: int, position_ids: Tensor | None) -> Rotation | None:
        if self.rotary is None:
            return None
        return self.rotary(length, position_ids)

    def _reduce(self, aux_losses: list[Tensor]) -> Tensor | None:
        if not aux_losses:
            return None
        reduction = self.config.run_config.moe.moe_aux_loss_reduction
        return reduce_over_layers(torch.stack(aux_losses), reduction)


class MoEMegatronForCausalLM(MoEMegatronPreTrainedModel, _transformers.GenerationMixin):
    """A language model of ours."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MoEMegatronConfig):
        super().__init__(config)
        gpt = build_gpt(config)
        self.model = MoEMegatronModel(config, gpt)
        if config.tie_word_embeddings:
            weight = gpt.embed_tokens.weight
            self.lm_head = nn.Linear(config.hidden_size, len(weight), bias=False, device="meta")
            self.lm_head.weight = weight
        else:
            self.lm_head = gpt.lm_head
        self._set_generation_defaults()
        _mark_initialized(self)
        self.post_init()

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Load the folder's settings of generation, and complete them."""
        super().adjust_generation_fn(*args, **kwargs)
        self._set_generation_defaults()

    def _set_generation_defaults(self) -> None:
        """Keep `generate` from choosing padding of the vocabulary, and from a cache where the
        experts of earlier tokens change with each new one.
        """
        settings = self.generation_config
        padding = range(self.config.run_config.model.vocab_size, self.config.vocab_size)
        suppressed = sorted({*(settings.suppress_tokens or ()), *padding})
        settings.suppress_tokens = suppressed or None
        if any(layer.gate.sees_other_tokens for layer in find_moe_layers(self)):
            settings.use_cache = False

    @_transformers.utils.can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> _outputs.MoeCausalLMOutputWithPast:
        """Predict the token after each position.

        Args:
            labels: token ids [B, S], which are shifted here; -100: not in the loss.
            logits_to_keep: compute the logits of this many last positions only; 0: of all.
            kwargs: for the model (`MoEMegatronModel.forward`) and for the loss.
        Returns:
            `aux_loss` is that of the gates, coefficients applied. In training it is part of the
            loss, weighted by the target tokens of this batch among `num_items_in_batch`.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        h_BSD = out.last_hidden_state
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep or None, None)
        logits_BSV = self.lm_head(h_BSD[:, logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, logits_BSV.shape[-1], **kwargs)
            if self.training and out.aux_loss is not None:
                loss = loss + _share_of_step(labels, **kwargs) * out.aux_loss
        return _outputs.MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=out.aux_loss,
            logits=logits_BSV,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
        )

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor | None:
        """Return the mask of padding as it is, which `generate` would make one of pairs."""
        return attention_mask


def _named(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> list[tuple[str, Any]]:
    return [("input_ids", input_ids), ("inputs_embeds", inputs_embeds)]


def _mark_initialized(model: nn.Module) -> None:
    """Mark new weights, which transformers would draw again."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter._is_hf_initialized = True


def _packed_documents(position_BS: Tensor) -> DocumentLayout | None:
    """Return the documents that begin where positions start again; None: one per sequence."""
    starts_BS = F.pad(position_BS.diff(dim=1) != 1, (1, 0))
    if not bool(starts_BS.any()):
        return None
    return DocumentLayout(starts_BS.cumsum(1))


def _share_of_step(
    labels: Tensor, num_items_in_batch: Tensor | int | None = None, **kwargs: Any
) -> Tensor | float:
    """Return this batch's share of the target tokens of an optimizer step."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[:, 1:] != -100).sum() / num_items_in_batch


_transformers.AutoConfig.register(MODEL_TYPE, MoEMegatronConfig, exist_ok=True)
_transformers.AutoModel.register(MoEMegatronConfig, MoEMegatronModel, exist_ok=True)
_transformers.AutoModelForCausalLM.register(
    MoEMegatronConfig, MoEMegatronForCausalLM, exist_ok=True
)
register_experts()
