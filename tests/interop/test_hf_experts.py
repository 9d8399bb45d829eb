"""Our experts in models of transformers: values and gradients against its own, and refusals."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from megatron.interop.hf_experts import EXPERTS_IMPLEMENTATION, register_experts  # noqa: E402

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 31,
}
FAMILIES = {
    "Mixtral": {"intermediate_size": 12, "num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen2Moe": {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3},
    "Qwen3Moe": {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3},
    "Olmoe": {"intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 1},
}


def make(family: str, **options) -> torch.nn.Module:
    """A small random model, whose experts are computed one after the other."""
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**{**SHAPE, **FAMILIES.get(family, {}), **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def results(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return out.logits.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_experts_equal_those_of_transformers(family, act):
    register_experts()
    model = make(family, hidden_act=act)
    tokens = torch.randint(31, (2, 7))
    logits, gradients = results(model, tokens)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    assert model.config._experts_implementation == EXPERTS_IMPLEMENTATION
    ours, our_gradients = results(model, tokens)
    assert not torch.equal(ours, logits), "the implementation was not changed"
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            our_gradients[name], gradient, rtol=0, atol=1e-5 * scale, msg=name
        )


def test_low_precision_and_autocast_are_close():
    """In bf16, and with fp32 hidden states and bf16 experts."""
    register_experts()
    model = make("Mixtral")
    tokens = torch.randint(31, (2, 7))
    expected = model(input_ids=tokens).logits
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    layer = model.model.layers[0].mlp
    x_TD = torch.randn(9, 16)
    index = torch.tensor([[0, 1], [4, 2], [3, 1]]).repeat(3, 1)
    weights = torch.rand(9, 2)
    wide = layer.experts(x_TD, index, weights)
    narrow = layer.experts.bfloat16()(x_TD, index, weights)
    assert narrow.dtype == torch.float32
    assert ((narrow - wide).norm() / wide.norm()) < 0.02
    half = model.bfloat16()(input_ids=tokens).logits.float()
    assert ((half - expected).norm() / expected.norm()) < 0.1


def test_other_experts_are_refused():
    register_experts()
    tokens = torch.randint(31, (1, 3))
    oss = make("GptOss", num_local_experts=4, num_experts_per_tok=2, intermediate_size=8)
    oss.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    with pytest.raises(ValueError, match="class is 'GptOssExperts'; allowed: .*no biases.*Use"):
        oss(input_ids=tokens)
    relu = make("Mixtral", hidden_act="relu")
    relu.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    with pytest.raises(
        ValueError, match="activation of MixtralExperts is 'ReLU'; allowed: SiLU"
    ):
        relu(input_ids=tokens)
