"""Hugging Face model types that are known and refused, and what ours lack for each.

They are refused by name before a tensor is read. A test lists the families of the installed
transformers that have a router: each has a converter or an entry here.
"""

from __future__ import annotations

from typing import Any

_AFTER = "it normalises the outputs of attention and feed-forward layers, and ours their inputs"
_ATTENTION_GATE = "a learned gate multiplies the output of its attention"
_DELTA = "some of its layers are linear attention with a delta rule"
_HYPER = "its residual stream is several streams that hyper-connections mix"
_IMAGES = "it reads images"
_MAMBA = "some of its layers are state-space layers (Mamba)"
_MULTIPLIERS = "it multiplies embeddings, residual branches, attention scores and logits"
_NO_ROTARY = "some of its layers have no positions"
_PARALLEL = "its attention and feed-forward layer read the same normalised input"
_SELECTED_KEYS = "an indexer selects the keys that a query sees (sparse attention)"
_ENCODER = "it is an encoder and a decoder"

# One line for each reason, and the model types that have it.
_REASONS: tuple[tuple[str, str], ...] = (
    (f"{_AFTER}, and {_ATTENTION_GATE}", "afmoe beam muse_spark"),
    (_AFTER, "exaone_moe flex_olmo kolibri1 gemma4 gemma4_assistant axk1"),
    (_ATTENTION_GATE, "axk2 laguna step3p5 step3p7"),
    (_DELTA, "bailing_hybrid kimi_linear qwen3_next qwen3_5_moe"),
    (f"{_DELTA}, and {_SELECTED_KEYS}", "qwen4_exp"),
    (f"{_DELTA}, and {_HYPER}", "glm5_next"),
    ("some of its layers are linear (lightning) attention", "minimax"),
    ("some of its layers are short convolutions", "lfm2_moe inkling inkling_mm_model inkling2"),
    (_MAMBA, "jamba nemotron_h granitemoehybrid"),
    (_MULTIPLIERS, "granitemoe granitemoe_swa granitemoeshared"),
    (_SELECTED_KEYS, "deepseek_v32 glm_moe_dsa dots3_note minimax_m3_vl mistral_large4"),
    (f"{_SELECTED_KEYS}, and {_HYPER}", "hy_v4"),
    (f"its attention compresses keys, and {_HYPER}", "deepseek_v4"),
    (
        _IMAGES,
        "aria deepseek_ocr2 unlimited_ocr diffusion_gemma ernie4_5_vl_moe glm4v_moe "
        "granite_docling qwen3_vl_moe qwen3_omni_moe qwen3_omni_moe_thinker",
    ),
    (_PARALLEL, "cohere2_moe"),
    (_NO_ROTARY, "flint llama4"),
    (_ENCODER, "nllb_moe switch_transformers"),
    ("its attention is not causal", "openai_privacy_filter"),
    ("its attention selects heads as an MoE layer selects experts", "jetmoe"),
    ("its attention mixes keys over time before the scores, and its router is an MLP", "zaya"),
    ("its attention masks keys by learned values", "doge"),
    ("it normalises queries and keys after the rotation, ours before", "hunyuan_v1_moe"),
    ("its layers with a sliding window have other numbers of heads", "mimo_v2_flash"),
    ("its layers with a sliding window have rotary positions of another base", "mellum"),
    ("each block has two attention layers, and the experts span both", "longcat_flash"),
    ("its queries grow with their position (Llama 4's scaling)", "mistral4"),
    ("its norms are LayerNorms without bias, and its QKV projection is fused", "dbrx"),
    ("its router is SparseMixer-v2, which no gate of ours equals", "phimoe"),
)

UNSUPPORTED: dict[str, str] = {
    model_type: reason for reason, names in _REASONS for model_type in names.split()
}
"""Reason by model type; those with the suffix _text are found without it"""


def unsupported_table() -> str:
    """Return the Markdown table of docs/huggingface.md."""
    lines = ["| model_type | why it is refused |", "|---|---|"]
    for reason, names in _REASONS:
        lines.append(f"| {', '.join(names.split())} | {reason} |")
    return "\n".join(lines) + "\n"


def unsupported_reason(model_type: Any) -> str | None:
    """Return why a known model type is not converted; None for others."""
    if not isinstance(model_type, str):
        return None
    return UNSUPPORTED.get(model_type.removesuffix("_text"))
