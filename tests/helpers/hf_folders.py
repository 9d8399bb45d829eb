"""Folders of tiny models with a tokenizer, as a user downloads them."""

from __future__ import annotations

from pathlib import Path

import torch

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "intermediate_size": 48,
        "num_experts_per_tok": 2,
    },
    "olmoe": {"num_experts": 4, "intermediate_size": 24, "num_experts_per_tok": 2},
    "deepseek_v2": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        **MLA,
    },
}
"""Keys of config.json by model_type, in addition to SIZES"""


def save_model(folder: Path, model_type: str, shard_size: str = "60KB") -> Path:
    """Save a random model of transformers with a tokenizer of bytes. Returns the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.for_model(model_type, **{**SIZES, **EXPERTS[model_type]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level BPE tokenizer without merges: 256 bytes after an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<|end|>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>"
    )
    fast.save_pretrained(folder)
