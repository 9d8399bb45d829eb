"""Text generation: greedy against a reference, sampled frequencies, ends of rows, errors."""

import pytest
import torch

from megatron.config.schema import ModelConfig
from megatron.inference.generate import generate
from megatron.inference.sampling import GREEDY, Sampling
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
    assert (
        generate(model, PROMPTS, max_new_tokens=10, sampling=GREEDY, vocab_size=V) == expected
    )
    assert (
        generate(model, PROMPTS, max_new_tokens=10, sampling=Sampling(top_k=1), vocab_size=V)
        == expected
    )
    assert (
        generate(model, PROMPTS, max_new_tokens=10, sampling=Sampling(top_p=1e-6), vocab_size=V)
        == expected
    )
    assert PROMPTS == [[1, 2, 3, 4, 5], [7], [9, 10, 0]], "the prompts were changed"


def test_long_prompt_is_cropped(model):
    prompt = [i % V for i in range(30)]
    assert generate(model, [prompt], max_new_tokens=3, sampling=GREEDY, vocab_size=V) == [
        greedy_reference(model, prompt, 3)
    ]


def test_vocabulary_padding_is_never_chosen(model):
    always(model, [0.0] * V + [50.0] * (PADDED - V))
    for temperature in (0.0, 1.0, 100.0):
        rows = generate(
            model, PROMPTS * 20, max_new_tokens=3, sampling=Sampling(temperature), vocab_size=V
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
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": 0.6, "temperature": 0.5}, [1, 0, 0, 0]),  # 9 / 16 of the largest
        # The token of the prompt has the logit ln 0.1, and ln 0.01 with the penalty.
        ({"repetition_penalty": 2.0}, [40 / 91, 30 / 91, 20 / 91, 1 / 91]),
    ],
)
def test_sampled_frequencies_match_probabilities(model, options, expected):
    order = [2, 0, 3, 1]  # the most likely token is not the first id
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    always(model, logits.tolist())
    rows = generate(
        model, [[1]] * 4000, max_new_tokens=1, vocab_size=4, sampling=Sampling(**options)
    )
    counts = torch.bincount(torch.tensor(rows).flatten(), minlength=4)[order] / 4000
    torch.testing.assert_close(counts, torch.tensor(expected).float(), rtol=0, atol=0.035)
    assert (counts[torch.tensor(expected) == 0] == 0).all()


def test_eod_ends_row_not_loop(model):
    free = generate(model, PROMPTS, max_new_tokens=8, sampling=GREEDY, vocab_size=V)
    eod = free[0][2]
    model.calls.clear()
    ended = generate(model, PROMPTS, max_new_tokens=8, sampling=GREEDY, vocab_size=V, eod=eod)
    for row, full in zip(ended, free):
        assert row == (full[: full.index(eod) + 1] if eod in full else full)
    assert len(ended[0]) <= 3 and len(model.calls) == 8
    assert [len(tokens) for tokens, _ in model.calls] == sorted(
        (len(tokens) for tokens, _ in model.calls), reverse=True
    )
    several = generate(
        model, PROMPTS, max_new_tokens=8, sampling=GREEDY, vocab_size=V, eod={eod, free[1][0]}
    )
    assert several[0] == ended[0] and several[1] == free[1][:1]


@pytest.mark.parametrize("fixed_steps", [False, True])
def test_all_rows_end_early(model, fixed_steps):
    """Other ranks may need this one for the number of steps that was set."""
    always(model, [9.0])
    options = {"max_new_tokens": 5, "vocab_size": V, "eod": 0, "sampling": GREEDY}
    assert generate(model, PROMPTS, fixed_steps=fixed_steps, **options) == [[0], [0], [0]]
    rest = [(1, 1)] * 4 if fixed_steps else []
    assert [tokens.shape for tokens, _ in model.calls] == [(3, 5), *rest]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_do_not_change_tokens(model, batch_size):
    """Equal prompts are sampled apart, also in different batches."""
    prompts = [*PROMPTS, *PROMPTS]
    options = {"max_new_tokens": 6, "vocab_size": V, "sampling": Sampling(3.0), "eod": 4}
    expected = generate(model, prompts, **options)
    model.calls.clear()
    assert generate(model, prompts, batch_size=batch_size, **options) == expected
    assert max(len(tokens) for tokens, _ in model.calls) == batch_size


def test_every_token_is_passed_on(model):
    """A row ends when the function returns True."""
    options = {"max_new_tokens": 6, "vocab_size": V, "sampling": GREEDY}
    expected = generate(model, PROMPTS, **options)
    got = [[], [], []]

    def on_token(row: int, token: int) -> bool:
        got[row].append(token)
        return row == 1 and len(got[row]) == 2

    rows = generate(model, PROMPTS, on_token=on_token, **options)
    assert rows == got == [expected[0], expected[1][:2], expected[2]]


def test_seed_and_progress_are_used(model):
    def sample(seed):
        return generate(
            model,
            PROMPTS,
            max_new_tokens=6,
            vocab_size=V,
            seed=seed,
            sampling=Sampling(3.0),
            progress=0.5,
        )

    torch.manual_seed(0)
    first = sample(1)
    torch.manual_seed(1)
    assert sample(1) == first != sample(2)
    assert all(kwargs["progress"] == 0.5 for _, kwargs in model.calls)
    assert generate(model, PROMPTS, max_new_tokens=0, vocab_size=V) == [[], [], []]


def test_generate_restores_training_mode(model):
    expected = generate(model, PROMPTS, max_new_tokens=4, sampling=GREEDY, vocab_size=V)
    assert (
        generate(model.train(), PROMPTS, max_new_tokens=4, sampling=GREEDY, vocab_size=V)
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
        ([[1]], {"batch_size": -1}, "batch_size is -1"),
    ],
)
def test_wrong_sizes_are_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 2, "vocab_size": V, **options})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_wrong_sampling_is_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} is {value}"):
        Sampling(**{setting: value})
