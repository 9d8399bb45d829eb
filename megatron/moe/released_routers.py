"""The routers of released models as our gates and options: data for converters and docs.

The models are those of Hugging Face transformers, whose router classes are the keys, as
"family/Class". A test builds each class with random weights and compares choices and
weights with the gate. docs/gates.md has the table; transformers is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ReleasedRouter:
    """One router, or several equal ones."""

    gate: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """options whose values the model's code fixes"""
    from_config: Mapping[str, str] = field(default_factory=dict)
    """attribute of the model's configuration by option; "1/x" is its reciprocal"""
    tensors: Mapping[str, str] = field(default_factory=lambda: {"router.weight": "weight"})
    """tensor of the router by our gate's tensor; the bias may belong to the MoE block"""
    note: str = ""
    """condition under which both are equal"""

    def options_of(self, config: Any) -> dict[str, Any]:
        """Return the gate's options for a model's configuration.

        Options that are None there keep our default: one group.
        """
        options = dict(self.options)
        for option, attribute in self.from_config.items():
            value = getattr(config, attribute.removeprefix("1/"))
            if attribute.startswith("1/"):
                value = 1 / value
            if value is not None:
                options[option] = value
        if getattr(config, "topk_method", None) == "greedy":
            options.pop("n_group", None)
            options.pop("topk_group", None)
        if getattr(config, "use_expert_bias", True) is False:
            options["bias_rule"] = "none"
        return options


_TOPK = {"topk": "num_experts_per_tok"}
_NORM = {"norm_topk_prob": "norm_topk_prob"}
_GROUPS = {"n_group": "n_group", "topk_group": "topk_group"}
_SCALE = {"routed_scaling_factor": "routed_scaling_factor"}
_SCORE = {"score_function": "scoring_func"}
_NORMED = {"norm_topk_prob": True}
_UNSCALED = {"routed_scaling_factor": 1.0}
_WEIGHT = {"router.weight": "weight"}
_BIASED = {**_WEIGHT, "expert_bias": "e_score_correction_bias"}
_SCALED_LATER = "the block applies the scale after the experts"
_NO_DROPS = "in evaluation, with a capacity that drops nothing"

# One line for each kind of router: its description and the classes that have it.
_ROUTERS: tuple[tuple[ReleasedRouter, str], ...] = (
    (
        ReleasedRouter("topk", {}, {**_TOPK, **_NORM}),
        "flex_olmo/FlexOlmoTopKRouter mellum/MellumTopKRouter olmoe/OlmoeTopKRouter "
        "qwen2_moe/Qwen2MoeTopKRouter qwen3_moe/Qwen3MoeTopKRouter "
        "qwen3_next/Qwen3NextTopKRouter qwen3_omni_moe/Qwen3OmniMoeThinkerTextTopKRouter "
        "qwen3_omni_moe/Qwen3OmniMoeTalkerTextTopKRouter qwen4_exp/Qwen4ExpTextTopKRouter",
    ),
    (
        ReleasedRouter("topk", _NORMED, _TOPK),
        "granitemoe/GraniteMoeTopKRouter granitemoe_swa/GraniteMoeSWATopKRouter "
        "granitemoehybrid/GraniteMoeHybridTopKRouter minimax/MiniMaxTopKRouter "
        "granitemoeshared/GraniteMoeSharedTopKRouter mixtral/MixtralTopKRouter "
        "qwen3_5_moe/Qwen3_5MoeTopKRouter qwen3_omni_moe/Qwen3OmniMoeTextTopKRouter "
        "qwen3_vl_moe/Qwen3VLMoeTextTopKRouter",
    ),
    (ReleasedRouter("topk", _NORMED, {"topk": "moe_topk"}), "aria/AriaTextTopKRouter"),
    (
        ReleasedRouter("topk", _NORMED, {"topk": "moe_topk"}, {"router.weight": "wg.weight"}),
        "hunyuan_v1_moe/HunYuanMoEV1Gate",
    ),
    (
        ReleasedRouter("topk", _NORMED, _TOPK, {"router.weight": "layer.weight"}),
        "jetmoe/JetMoeTopKGating",
    ),
    (
        ReleasedRouter(
            "topk",
            _NORMED,
            {"topk": "moe_top_k"},
            {"router.weight": "router.layer.weight"},
            "with moe_normalize_expert_weights 1, the default",
        ),
        "dbrx/DbrxRouter dbrx/DbrxFFN",
    ),
    (ReleasedRouter("topk", {}, _TOPK), "jamba/JambaTopKRouter"),
    (
        ReleasedRouter(
            "topk",
            {"topk": 1},
            {"router_bias": "router_bias"},
            {"router.weight": "classifier.weight", "router.bias": "classifier.bias"},
            _NO_DROPS,
        ),
        "switch_transformers/SwitchTransformersTop1Router",
    ),
    (
        ReleasedRouter(
            "topk",
            {"topk": 2, **_NORMED},
            {"router_bias": "router_bias"},
            {"router.weight": "classifier.weight", "router.bias": "classifier.bias"},
            _NO_DROPS,
        ),
        "nllb_moe/NllbMoeTop2Router",
    ),
    (
        ReleasedRouter(
            "topk",
            {},
            {**_TOPK, "score_function": "expert_selection_fn", **_NORM},
            note="with softmax only if norm_topk_prob is on, as in the released models",
        ),
        "cohere2_moe/Cohere2MoeTopKRouter",
    ),
    (
        ReleasedRouter(
            "topk",
            {"router_bias": True, **_NORMED},
            _TOPK,
            {**_WEIGHT, "router.bias": "bias"},
        ),
        "gpt_oss/GptOssTopKRouter",
    ),
    (
        ReleasedRouter(
            "topk",
            {"router_bias": True, **_NORMED},
            {**_TOPK, "routed_scaling_factor": "1/num_experts_per_tok"},
            {**_WEIGHT, "router.bias": "bias"},
        ),
        "openai_privacy_filter/OpenAIPrivacyFilterTopKRouter",
    ),
    (
        ReleasedRouter("topk", {"score_function": "sigmoid"}, {**_TOPK, **_NORM}),
        "flint/FlintTopKRouter",
    ),
    (
        ReleasedRouter(
            "topk",
            {"score_function": "sigmoid"},
            _TOPK,
            note="the block applies the weights to the input of the experts",
        ),
        "llama4/Llama4Router",
    ),
    (
        ReleasedRouter(
            "topk",
            {"router_norm": True, "expert_scale": True, **_NORMED},
            {"topk": "top_k_experts"},
            {
                "router.weight": "proj.weight",
                "router_norm.weight": "scale",
                "expert_scale_E": "per_expert_scale",
            },
        ),
        "gemma4/Gemma4TextRouter diffusion_gemma/DiffusionGemmaTextRouter",
    ),
    (
        ReleasedRouter(
            "topk",
            {"bias_rule": "sign", **_NORMED},
            {**_TOPK, "norm_floor": "moe_norm_min"},
            {**_WEIGHT, "expert_bias": "moe_statics.e_score_correction_bias"},
        ),
        "ernie4_5_moe/Ernie4_5_MoeTopKRouter ernie4_5_vl_moe/Ernie4_5_VLMoeMoeTopKRouter",
    ),
    (
        ReleasedRouter("deepseek_v2", {}, {**_TOPK, **_GROUPS, **_SCALE}),
        "deepseek_v2/DeepseekV2TopkRouter deepseek_ocr2/DeepseekOcr2TextTopkRouter "
        "unlimited_ocr/UnlimitedOcrTextTopkRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v2", {"group_score_best": 2}, {**_TOPK, **_GROUPS, **_NORM, **_SCALE}
        ),
        "mistral4/Mistral4TopkRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v2", {"group_score_best": 2, **_NORMED}, {**_TOPK, **_GROUPS, **_SCALE}
        ),
        "mistral_large4/MistralLarge4TextTopkRouter",
    ),
    (
        ReleasedRouter("deepseek_v3", {}, {**_TOPK, **_GROUPS, **_NORM, **_SCALE}, _BIASED),
        "axk1/AXK1TopkRouter bailing_hybrid/BailingHybridTopkRouter "
        "deepseek_v3/DeepseekV3TopkRouter deepseek_v32/DeepseekV32TopkRouter "
        "dots1/Dots1TopkRouter dots3_note/Dots3NoteTextTopkRouter "
        "exaone_moe/ExaoneMoeTopkRouter glm4_moe/Glm4MoeTopkRouter "
        "glm4_moe_lite/Glm4MoeLiteTopkRouter glm4v_moe/Glm4vMoeTextTopkRouter "
        "glm5_next/Glm5NextTextTopkRouter glm_moe_dsa/GlmMoeDsaTopkRouter "
        "hy_v4/HYV4TopkRouter kimi_linear/KimiLinearTopkRouter "
        "mimo_v2_flash/MiMoV2FlashTopkRouter nemotron_h/NemotronHTopkRouter "
        "solar_open/SolarOpenTopkRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v3",
            {},
            {**_TOPK, **_GROUPS, **_NORM, **_SCALE},
            _BIASED,
            _SCALED_LATER,
        ),
        "beam/BeamTopKRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v3",
            {},
            {**_TOPK, **_GROUPS, **_NORM, **_SCALE},
            _BIASED,
            "it masks closed groups with 0, which wins where fewer than k scores in open "
            "groups are above 0 with their bias",
        ),
        "axk2/AXK2TopkRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v3",
            _NORMED,
            {**_TOPK, "routed_scaling_factor": "route_scale"},
            {"router.weight": "gate.weight"},
        ),
        "afmoe/AfmoeTokenChoiceRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v3",
            _NORMED,
            {**_TOPK, "routed_scaling_factor": "router_scaling_factor"},
        ),
        "hy_v3/HYV3TopKRouter dots3_note/Dots3NoteVisionTopKRouter",
    ),
    (
        ReleasedRouter("deepseek_v3", {**_NORMED, **_UNSCALED}, _TOPK),
        "minimax_m2/MiniMaxM2TopKRouter",
    ),
    (
        ReleasedRouter("deepseek_v3", _NORMED, {**_TOPK, **_SCALE}, _BIASED, _SCALED_LATER),
        "minimax_m3_vl/MiniMaxM3VLTopKRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v3",
            _NORMED,
            {**_TOPK, "routed_scaling_factor": "moe_router_scaling_factor"},
            _BIASED,
            _SCALED_LATER,
        ),
        "step3p7/Step3p7TopKRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v3",
            _NORMED,
            {
                **_TOPK,
                "logit_softcap": "moe_router_logit_softcapping",
                "routed_scaling_factor": "moe_routed_scaling_factor",
            },
            _BIASED,
            _SCALED_LATER,
        ),
        "laguna/LagunaTopKRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v3",
            _NORMED,
            {**_TOPK, "logit_scale": "output_multiplier", **_SCALE},
            _BIASED,
        ),
        "muse_spark/MuseSparkTopkRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v3",
            {},
            {**_TOPK, **_NORM, **_SCALE},
            note="it adds 1e-6 to the sum of the scores",
        ),
        "lfm2_moe/Lfm2MoeTopKRouter",
    ),
    (
        ReleasedRouter(
            "deepseek_v3", {"bias_on": "logit", **_UNSCALED}, {**_TOPK, **_NORM}, _BIASED
        ),
        "kolibri1/Kolibri1TopKRouter",
    ),
    (
        ReleasedRouter("deepseek_v3", _NORMED, {**_TOPK, **_SCORE, **_SCALE}, _BIASED),
        "deepseek_v4/DeepseekV4TopKRouter inkling2/Inkling2TopKRouter",
    ),
    (
        ReleasedRouter(
            "hash",
            {"learned_weights": True, **_NORMED},
            {**_TOPK, **_SCORE, **_SCALE},
            {**_WEIGHT, "table_V": "tid2eid"},
        ),
        "deepseek_v4/DeepseekV4HashRouter",
    ),
    (
        ReleasedRouter(
            "longcat",
            {},
            {"topk": "moe_topk", "num_identity_experts": "zero_expert_num", **_SCALE},
            {
                "router.weight": "classifier.weight",
                "expert_bias": "e_score_correction_bias",
            },
            "the biases of its identity paths, which ours has not, are equal (0)",
        ),
        "longcat_flash/LongcatFlashTopkRouter",
    ),
)

RELEASED_ROUTERS: dict[str, ReleasedRouter] = {
    name: router for router, names in _ROUTERS for name in names.split()
}
"""Our gate and options by "family/Class" of transformers"""

NOT_EXPRESSED: dict[str, str] = {
    "doge/DogeCDMoE": "product keys whose two halves are split over tokens instead of "
    "features, so that tokens exchange their logits; `peer` splits features",
    "granite_docling/GraniteDoclingDensityRouter": "not a router of experts: it predicts "
    "how densely the text of an image is set",
    "inkling/InklingTopkRouter": "the shared experts have logits, and the sum that divides "
    "the weights includes their scores",
    "phimoe/PhimoeTopKRouter": "SparseMixer-v2: the second expert's softmax leaves out the "
    "first, logits far below the maximum are masked, and training samples the experts",
    "zaya/ZayaRouter": "the router is an MLP on a down-projected state that is passed from "
    "layer to layer, with a skip path",
}
"""Router classes that no gate equals, and why"""


def released_router_table() -> str:
    """Return the Markdown tables of docs/gates.md."""
    lines = [
        "| model families of transformers | gate and fixed options | options from its "
        "configuration | condition |",
        "|---|---|---|---|",
    ]
    for router, names in _ROUTERS:
        families = dict.fromkeys(name.split("/")[0] for name in names.split())
        flags = [f"`--gate {router.gate}`"]
        flags += [f"`{_flag(option, value)}`" for option, value in router.options.items()]
        taken = [f"{option} = {name}" for option, name in router.from_config.items()]
        lines.append(
            f"| {', '.join(families)} | {' '.join(flags)} | {', '.join(taken)} | "
            f"{router.note} |"
        )
    lines += ["", "| router without an equal gate | reason |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in NOT_EXPRESSED.items()]
    return "\n".join(lines) + "\n"


def _flag(option: str, value: Any) -> str:
    """Return an option as it is written on a command line."""
    flag = f"--{option.replace('_', '-')}"
    if value is True:
        return flag
    return f"{flag} {value}"
