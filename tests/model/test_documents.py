"""Documents packed into one sample do not see each other, bit for bit.

From the loader's batch through the complete model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.schema import DataConfig, ModelConfig, MoEConfig
from megatron.data.loader import Batch, make_batch
from megatron.model.builder import build_model
from megatron.model.gpt import GPT
from megatron.parallel.groups import Groups

EOD, V = 0, 40
# Documents: the end of one, one of 5 tokens, one that is only its end-of-document token, one of
# 2 tokens, and the beginning of one. The last token is a label only.
SAMPLE = [7, 3, EOD, 5, 9, 9, 2, EOD, EOD, 11, EOD, 3, 7, 21, 5, 30, 8]
DOCUMENTS = [slice(0, 3), slice(3, 8), slice(8, 9), slice(9, 11), slice(11, 16)]
LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=10,
    seq_length=16,
    swiglu=True,
    init_method_std=0.3,
)
GPT2 = ModelConfig(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=3,
    seq_length=16,
    position_embedding_type="learned",
    normalization="LayerNorm",
    init_method_std=0.3,
)
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
OPTIONS = ("reset_position_ids", "reset_attention_mask")

pytestmark = pytest.mark.usefixtures("document_path")


class Operators(TorchDispatchMode):
    """Records the names of the operators that run inside this context."""

    def __enter__(self) -> Operators:
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def make(
    config: ModelConfig, moe: MoEConfig | None = None, recompute: bool = False, **options
) -> GPT:
    groups = Groups(
        rank=0, world_size=1, backend="gloo", reason="test", ep_size=1, ep_group=None
    )
    moe = moe or MoEConfig()
    return build_model(
        config,
        moe,
        {moe.gate: options},
        vocab_size=V,
        seed=3,
        groups=groups,
        recompute=recompute,
    )


def packed(*flags: str) -> Batch:
    """Return two samples: SAMPLE, and one of a single document."""
    samples = np.array([SAMPLE, np.arange(1, 18)])
    return make_batch(samples, DataConfig(**dict.fromkeys(flags or OPTIONS, True)), EOD)


def run(model: GPT, batch: Batch, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Return logits, with the same dropout every time."""
    torch.manual_seed(9)
    return model(
        batch.tokens_BS if tokens is None else tokens,
        position_ids_BS=batch.position_ids_BS,
        segments_BS=batch.segments_BS,
    ).logits


def changed(batch: Batch, where: slice | int) -> torch.Tensor:
    """Return the batch's tokens with other tokens at `where`."""
    tokens = batch.tokens_BS.clone()
    tokens[0, where] = (tokens[0, where] + 13) % V
    return tokens


MODES = {
    "evaluation": {},
    "training": {"train": True},
    "recomputed": {"train": True, "recompute": True},
    "dropout": {"train": True, "dropout": 0.2},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_documents_do_not_change_others_logits(config, dtype, mode):
    options = MODES[mode]
    model = (
        make(
            dataclasses.replace(config, attention_dropout=options.get("dropout", 0.0)),
            recompute=options.get("recompute", False),
        )
        .to(dtype)
        .train(options.get("train", False))
    )
    batch = packed()
    before = run(model, batch)
    assert before.dtype == dtype and before.grad_fn is not None
    for document in DOCUMENTS:
        others = [t for t in range(16) if not document.start <= t < document.stop]
        for t in range(document.start, document.stop):
            after = run(model, batch, changed(batch, t))
            assert torch.equal(after[0, others], before[0, others]) and torch.equal(
                after[1], before[1]
            )
            assert torch.equal(after[0, document.start : t], before[0, document.start : t])
            assert all(
                not torch.equal(after[0, i], before[0, i]) for i in range(t, document.stop)
            )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_runs_the_fused_kernel(dtype, dropout, document_path):
    """The tests above cover the kernels used in training: fused, or unfused with dropout."""
    model = make(dataclasses.replace(LLAMA, attention_dropout=dropout)).to(dtype)
    with Operators() as operators:
        run(model, packed())
    fused = sum(FLASH in name for name in operators.names)
    # Padded to 1, 2, 3, 6 and 16 tokens, the documents of both samples are five batches.
    calls = {"mask": 1, "batches": 5}[document_path] * LLAMA.num_layers
    assert fused == (0 if dropout else calls)
    assert any("_softmax" in name for name in operators.names) == bool(dropout)


@torch.no_grad()
def test_documents_are_separate_at_demo_shape():
    """With a head dimension of 64 and 256 tokens, the kernel runs several blocks."""
    config = ModelConfig(
        num_layers=1,
        hidden_size=256,
        num_attention_heads=4,
        seq_length=256,
        init_method_std=0.1,
    )
    model, sample = make(config).bfloat16(), np.arange(257)[None] % (V - 1) + 1
    ends = [0, 40, 41, 127, 128, 200]
    sample[0, ends] = EOD
    batch = make_batch(sample, DataConfig(**dict.fromkeys(OPTIONS, True)), EOD)
    before = run(model, batch)
    for start, stop in zip([0, *(e + 1 for e in ends)], [*(e + 1 for e in ends), 256]):
        after = run(model, batch, changed(batch, slice(start, stop)))
        assert torch.equal(after[0, :start], before[0, :start]) and torch.equal(
            after[0, stop:], before[0, stop:]
        )
        assert not torch.equal(after[0, start:stop], before[0, start:stop])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_documents_do_not_change_others_gradients(config, dtype, recompute):
    batch = packed()
    for n, document in enumerate(DOCUMENTS):
        mask, gradients = (batch.segments_BS == n).float(), []
        mask[1] = 0
        for tokens in (
            batch.tokens_BS,
            *(changed(batch, other) for other in DOCUMENTS if other != document),
        ):
            model = make(config, recompute=recompute).to(dtype).train()
            model(
                tokens, batch.labels_BS, mask, batch.position_ids_BS, batch.segments_BS
            ).loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        for other in gradients[1:]:
            assert all(torch.equal(g, gradients[0][name]) for name, g in other.items())
        assert any(g.abs().max() > 0 for g in gradients[0].values())


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@torch.no_grad()
def test_packed_document_equals_document_alone(config, dtype, close):
    model, batch = make(config).to(dtype), packed()
    logits = run(model, batch)
    scale = float(logits.abs().max())
    for document in DOCUMENTS:
        alone = model(batch.tokens_BS[:1, document]).logits
        torch.testing.assert_close(logits[:1, document], alone, rtol=0, atol=close * scale)
    torch.testing.assert_close(
        logits[1:], model(batch.tokens_BS[1:]).logits, rtol=0, atol=close * scale
    )


@torch.no_grad()
def test_reset_options_act_separately():
    """Without the mask documents see each other; positions matter to a learned table only."""
    for config in (LLAMA, GPT2):
        model, both = make(config), packed()
        logits, unmasked = run(model, both), run(model, packed("reset_position_ids"))
        assert all(not torch.equal(unmasked[0, t], logits[0, t]) for t in range(3, 16))
        continued = run(model, packed("reset_attention_mask"))
        torch.testing.assert_close(continued[0, :3], logits[0, :3])
        same = torch.allclose(continued[0, 3:], logits[0, 3:], rtol=1e-4, atol=1e-4)
        assert same == (config is LLAMA), "only rotary positions are relative"


@torch.no_grad()
def test_documents_are_separate_with_moe_layers():
    """In fp64: experts process rows of all documents together, in any order of summation."""
    moe = MoEConfig(num_experts=4, gate="threshold", expert_interval=2, moe_ffn_hidden_size=24)
    model, batch = make(LLAMA, moe, threshold=0.6).double(), packed()
    before = run(model, batch)
    for document in DOCUMENTS:
        others = [t for t in range(16) if not document.start <= t < document.stop]
        after = run(model, batch, changed(batch, document))
        torch.testing.assert_close(after[0, others], before[0, others], rtol=1e-11, atol=1e-11)
        assert (after[0, document] - before[0, document]).abs().max() > 1e-3
        alone = model(batch.tokens_BS[:1, document]).logits
        torch.testing.assert_close(before[:1, document], alone, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_eod_mask_loss_excludes_next_token():
    model, batch = make(LLAMA), packed("eod_mask_loss")
    probability = run(model, batch).softmax(-1)
    terms = [
        -float(probability[b, t, batch.labels_BS[b, t]].log())
        for b in range(2)
        for t in range(16)
        if batch.tokens_BS[b, t] != EOD
    ]
    assert len(terms) == 28
    loss = model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS).loss
    assert float(loss) == pytest.approx(sum(terms) / 28, rel=1e-5)
