"""Text generation: greedy against a reference, sampled frequencies, ends of rows, errors."""

import pytest
import torch

from megatron.config.schema import ModelConfig
from megatron.inference.generate import generate
from megatron.model.gpt import GPT
from megatron.model.mlp import MLP

V = 11
PADDED = 16
LIMIT = 12
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 10, 0]]


@pytest.fixture
def model() -> GPT:
    config = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        seq_length=LIMIT,
        init_method_std=0.5,
        untie_embeddings_and_output_weights=True,
        hidden_dropout=0.5,
    )
    model = GPT(config, PADDED, make_ffn=lambda i: MLP(16, 32, "gelu"))
    model.init_weights(1)
    model.calls = []
    model.register_forward_hook(
        lambda m, args, kwargs, out: m.calls.append((args[0], kwargs)), with_kwargs=True
    )
    return model.eval()


def greedy_reference(model, prompt, count):
    row = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([row[-LIMIT:]])).logits[0, -1, :V]
        row.append(max(range(V), key=lambda i: logits[i]))
    return row[len(prompt) :]


def always(model, logits: list[float]):
    """Make the model return these logits for any input."""
    model.norm.register_forward_hook(
        lambda m, args, y: torch.zeros_like(y).index_fill_(-1, torch.tensor([0]), 1.0)
    )
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[: len(logits), 0] = torch.tensor(logits)


def test_greedy_batch_equals_single_prompts(model):
    # 10 new tokens take the first prompt past the window of 12
    expected = [greedy_reference(model, prompt, 10) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == 3
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=0, vocab_size=V) == expected
    assert generate(model, PROMPTS, max_new_tokens=10, top_k=1, vocab_size=V) == expected
    assert generate(model, PROMPTS, max_new_tokens=10, top_p=1e-6, vocab_size=V) == expected
    assert PROMPTS == [[1, 2, 3, 4, 5], [7], [9, 10, 0]], "the prompts were changed"


def test_long_prompt_is_cropped(model):
    prompt = [i % V for i in range(30)]
    assert generate(model, [prompt], max_new_tokens=3, temperature=0, vocab_size=V) == [
        greedy_reference(model, prompt, 3)
    ]


def test_vocabulary_padding_is_never_chosen(model):
    always(model, [0.0] * V + [50.0] * (PADDED - V))
    for temperature in (0.0, 1.0, 100.0):
        rows = generate(
            model, PROMPTS * 20, max_new_tokens=3, temperature=temperature, vocab_size=V
        )
        assert max(max(row) for row in rows) < V
    assert min(generate(model, [[1]], max_new_tokens=3, vocab_size=PADDED)[0]) >= V


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        (
            {"top_k": 3, "top_p": 0.75},
            [4 / 7, 3 / 7, 0, 0],
        ),  # top_p applies to what top_k left: 4/9 + 3/9 reach 0.75
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ],
)
def test_sampled_frequencies_match_probabilities(model, options, expected):
    order = [2, 0, 3, 1]  # the most likely token is not the first id
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    always(model, logits.tolist())
    rows = generate(model, [[1]] * 4000, max_new_tokens=1, vocab_size=4, **options)
    counts = torch.bincount(torch.tensor(rows).flatten(), minlength=4)[order] / 4000
    torch.testing.assert_close(counts, torch.tensor(expected), rtol=0, atol=0.035)
    assert (counts[torch.tensor(expected) == 0] == 0).all()


def test_eod_ends_row_not_loop(model):
    free = generate(model, PROMPTS, max_new_tokens=8, temperature=0, vocab_size=V)
    eod = free[0][2]
    model.calls.clear()
    ended = generate(model, PROMPTS, max_new_tokens=8, temperature=0, vocab_size=V, eod=eod)
    for row, full in zip(ended, free):
        assert row == (full[: full.index(eod) + 1] if eod in full else full)
    assert len(ended[0]) <= 3 and len(model.calls) == 8
    always(model, [9.0])
    model.calls.clear()
    assert generate(model, PROMPTS, max_new_tokens=5, temperature=0, vocab_size=V, eod=0) == [
        [0],
        [0],
        [0],
    ]
    assert [tokens.shape for tokens, _ in model.calls] == [(3, 5)] + [(1, 1)] * 4, (
        "all ranks need 5 forward passes"
    )


def test_seed_and_progress_are_used(model):
    def sample(seed):
        return generate(
            model,
            PROMPTS,
            max_new_tokens=6,
            vocab_size=V,
            seed=seed,
            temperature=3.0,
            progress=0.5,
        )

    torch.manual_seed(0)
    first = sample(1)
    torch.manual_seed(1)
    assert sample(1) == first != sample(2)
    assert all(kwargs["progress"] == 0.5 for _, kwargs in model.calls)
    assert generate(model, PROMPTS, max_new_tokens=0, vocab_size=V) == [[], [], []]


def test_generate_restores_training_mode(model):
    expected = generate(model, PROMPTS, max_new_tokens=4, temperature=0, vocab_size=V)
    assert (
        generate(model.train(), PROMPTS, max_new_tokens=4, temperature=0, vocab_size=V)
        == expected
    )
    assert model.training
    with pytest.raises(IndexError):
        generate(model, [[PADDED]], max_new_tokens=1, vocab_size=V)
    assert model.training
    generate(model.eval(), PROMPTS, max_new_tokens=1, vocab_size=V)
    assert not model.training


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "lengths of the prompts is"),
        ([[1], []], {}, r"lengths of the prompts is \[1, 0\].*end-of-document"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1]], {"vocab_size": PADDED + 1}, "vocab_size is 17; allowed: 1 to the model's 16"),
        ([[1]], {"vocab_size": 0}, "vocab_size is 0"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
    ],
)
def test_wrong_settings_are_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 2, "vocab_size": V, **options})
