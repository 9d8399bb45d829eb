"""Our models in transformers against the training model: values, gradients, generation."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.transformers_twins import VOCAB, make_run, twins  # noqa: E402
from megatron.inference.generate import generate  # noqa: E402
from megatron.inference.sampling import Sampling  # noqa: E402
from megatron.moe.gate import available_gates, gate_class  # noqa: E402
from megatron.moe.gate_update import GateUpdater  # noqa: E402
from megatron.moe.layer_sums import find_moe_layers  # noqa: E402
from megatron.parallel.groups import Groups  # noqa: E402

GATES = available_gates()
SHORT = [5, 17]
LONG = [3, 9, 30, 9, 1, 12, 28, 7]
OTHER = [11, 0, 22, 6]
VARIANTS = {
    "learned": {
        "position_embedding_type": "learned",
        "normalization": "LayerNorm",
        "activation": "geglu",
        "untie_embeddings_and_output_weights": False,
        "moe": {"moe_shared_experts": 1, "moe_latent_size": 8},
    },
    "biases": {
        "activation": "swiglu",
        "attention": {"add_qkv_bias": True, "attention_output_bias": True},
        "rotary": {"rotary_percent": 0.5},
        "moe": {"moe_first_k_dense": 1, "moe_aux_loss_reduction": "mean"},
    },
    "window": {
        "attention": {
            "window_size": 4,
            "window_layers": (1,),
            "attention_sinks": True,
            "qk_norm": "head",
        },
        "rotary": {"rope_scaling": "yarn", "rope_scaling_factor": 4.0},
        "moe": {"expert_type": "swiglu_clamped"},
    },
    "latent": {
        "num_query_groups": 0,
        "attention": {
            "attention": "mla",
            "q_lora_rank": 6,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 5,
        },
    },
    "dense": {},
}


def run_of(name: str):
    """The run of a gate, or of a variant of the gate topk."""
    if name == "dense":
        return make_run(moe={"num_experts": 0, "gate": "topk", "moe_ffn_hidden_size": 0})
    return make_run(**VARIANTS[name]) if name in VARIANTS else make_run(name)


def left_padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    ids = [[0] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def greedy(model, prompts: list[list[int]], count: int = 8, **options) -> list[list[int]]:
    batch = left_padded(prompts)
    rows = model.generate(
        **batch,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return rows[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", [*GATES, *VARIANTS])
def test_logits_and_gradients_equal_training(name):
    run = run_of(name)
    gpt, model = twins(run)
    tokens = torch.randint(VOCAB, (3, 9))
    with torch.no_grad():
        expected = gpt(tokens, progress=1.0, independent_sequences=True).logits
        out = model(tokens, labels=tokens)
    assert torch.equal(out.logits, expected) and out.loss > 0
    gpt.train()
    model.train()
    labels = tokens.roll(-1, 1)
    mask = torch.ones(3, 9).index_fill_(1, torch.tensor([8]), 0.0)
    torch.manual_seed(1)
    ours = gpt(tokens, labels, mask, progress=1.0)
    ours.loss.backward()
    torch.manual_seed(1)
    out = model(tokens, labels=tokens)
    out.loss.backward()
    torch.testing.assert_close(out.loss, ours.loss)
    if name != "dense":
        assert torch.equal(out.aux_loss, ours.aux_loss)
    gradients = {n.removeprefix("model."): p.grad for n, p in model.named_parameters()}
    assert gradients.keys() == {n for n, _ in gpt.named_parameters()}
    for parameter_name, parameter in gpt.named_parameters():
        expected = parameter.grad
        if expected is None:
            assert gradients[parameter_name] is None
            continue
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            gradients[parameter_name], expected, rtol=0, atol=1e-5 * scale, msg=parameter_name
        )


@pytest.mark.parametrize("name", [*GATES, *VARIANTS])
def test_greedy_text_equals_ours(name):
    """In a left-padded batch and alone, with and without a cache, which is off by default for
    gates that look at other tokens."""
    gpt, model = twins(run_of(name))
    prompts = [SHORT, LONG, OTHER]
    best = Sampling(temperature=0)
    expected = generate(gpt, prompts, max_new_tokens=8, vocab_size=VOCAB, sampling=best)
    assert len({tuple(text) for text in expected}) == 3
    assert greedy(model, prompts, use_cache=False) == expected
    assert greedy(model, [LONG], use_cache=False) == expected[1:2]
    assert greedy(model, prompts) == expected
    assert greedy(model, [SHORT]) == expected[:1]
    looks_at_others = name in GATES and gate_class(name).sees_other_tokens
    assert model.generation_config.use_cache is not looks_at_others
    if name in ("moepp", *VARIANTS):
        assert greedy(model, prompts, cache_implementation="static") == expected
    for layer in find_moe_layers(model):
        sums = layer.counters[False]
        assert torch.equal(sums["dispatched_C"], sums["assigned_C"])


def test_padding_on_either_side_changes_nothing():
    _, model = twins(make_run(options={"topk": 2}))
    alone = [model(torch.tensor([p])).logits[0] for p in (SHORT, LONG)]
    right = {
        "input_ids": torch.tensor([SHORT + [7] * 6, LONG]),
        "attention_mask": torch.tensor([[1] * 2 + [0] * 6, [1] * 8]),
    }
    logits = model(**right).logits
    torch.testing.assert_close(logits[0, :2], alone[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1], alone[1], rtol=0, atol=1e-4)
    for layer in find_moe_layers(model):
        layer.counters[False].clear()
    logits = model(**left_padded([SHORT, LONG]), use_cache=False).logits
    torch.testing.assert_close(logits[0, 6:], alone[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1], alone[1], rtol=0, atol=1e-4)
    assert all(layer.counters[False]["tokens"] == 10 for layer in find_moe_layers(model))


def test_right_padding_stays_hidden_from_later_tokens():
    """A cache that was filled with padding on the right."""
    _, model = twins(make_run())
    ids = torch.tensor([SHORT + [7] * 6, LONG])
    mask = torch.tensor([[1] * 2 + [0] * 6, [1] * 8])
    out = model(ids, attention_mask=mask, use_cache=True)
    new = torch.tensor([[4, 8], [15, 16]])
    mask = torch.cat([mask, torch.ones_like(new)], 1)
    logits = model(new, attention_mask=mask, past_key_values=out.past_key_values).logits
    expected = model(torch.tensor([[*SHORT, 4, 8]])).logits[0, -2:]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-4)
    assert out.past_key_values.get_seq_length() == 10


def test_packed_positions_separate_documents():
    _, model = twins(make_run(options={"topk": 2}))
    positions = torch.tensor([[*range(2), *range(8), *range(4)]])
    packed = torch.tensor([SHORT + LONG + OTHER])
    logits = model(packed, position_ids=positions, use_cache=False).logits[0]
    expected = [model(torch.tensor([p])).logits[0] for p in (SHORT, LONG, OTHER)]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-4)


def test_beams_and_samples_are_generated():
    _, model = twins(make_run("threshold"))
    best = greedy(model, [SHORT, LONG], count=6, num_beams=3)
    alone = greedy(model, [SHORT], count=6, num_beams=3)
    assert best[0] == alone[0] and best != greedy(model, [SHORT, LONG], count=6)
    torch.manual_seed(0)
    sampled = model.generate(torch.tensor([SHORT] * 20), max_new_tokens=1, do_sample=True)
    assert len(set(sampled[:, -1].tolist())) > 2


@pytest.mark.parametrize("name", ["topk", *VARIANTS])
def test_rejected_guesses_leave_the_cache(name):
    """Tokens that transformers guesses from the prompt are removed from the cache again."""
    _, model = twins(run_of(name))
    prompt = [[3, 4, 5, 3, 4]]
    assert greedy(model, prompt, prompt_lookup_num_tokens=2) == greedy(model, prompt)


def test_checkpointing_keeps_loss_and_gradients():
    """The recomputed pass repeats the routing of the first, random numbers included."""
    _, model = twins(make_run(options={"topk": 2, "jitter": 0.3}, hidden_dropout=0.2))
    tokens = torch.randint(VOCAB, (2, 9))
    model.train()
    results = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        out = model(tokens, labels=tokens)
        assert out.past_key_values is None
        out.loss.backward()
        results.append((out.loss.item(), [p.grad.clone() for p in model.parameters()]))
    assert model.is_activation_checkpointing and results[0][0] == results[1][0]
    for first, second in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="past_key_values is 'DynamicCache'; allowed: None"):
        model(tokens, past_key_values=transformers.DynamicCache())


def test_loss_counts_labels_and_items():
    """Ignored labels have no loss, and several batches of a step are weighted by their targets."""
    gpt, model = twins(make_run(options={"loss_coeff": 0.1}))
    tokens = torch.randint(VOCAB, (2, 9))
    labels = tokens.clone()
    labels[0, :5] = -100
    out = model(tokens, labels=labels)
    logits = gpt(tokens, progress=1.0, independent_sequences=True).logits
    target = labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target)
    torch.testing.assert_close(out.loss, expected)
    count = int((target >= 0).sum())
    assert count == 12
    model.train()
    out = model(tokens, labels=labels)
    torch.testing.assert_close(out.loss, expected + out.aux_loss)
    assert out.aux_loss > 0
    step = model(tokens, labels=labels, num_items_in_batch=3 * count)
    torch.testing.assert_close(step.loss, out.loss / 3)
    last = model(tokens, logits_to_keep=1).logits
    torch.testing.assert_close(last, model(tokens).logits[:, -1:])
    as_tuple = model(tokens, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.loss)


WITHOUT_LOGITS = ("dynmoe", "hash", "peer")


@pytest.mark.parametrize("name", GATES)
def test_router_logits_are_recorded(name):
    _, model = twins(make_run(name))
    batch = left_padded([SHORT, LONG])
    out = model(**batch, output_router_logits=True, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 8, 16)] * 3
    if name in WITHOUT_LOGITS:
        assert out.router_logits == ()
        return
    layers = find_moe_layers(model)
    assert len(out.router_logits) == len(layers) == 2
    # The residual stream before and after the first block.
    block = model.model.layers[0]
    with torch.no_grad():
        alone = model(torch.tensor([LONG]), output_router_logits=True)
    for logits, other in zip(out.router_logits, alone.router_logits, strict=True):
        assert logits.dtype == torch.float32 and logits.shape[0] == 16
        assert (logits[:6] == 0).all(), "padding has no logits"
        torch.testing.assert_close(logits[8:], other, rtol=0, atol=1e-4)
    router = getattr(block.mlp.gate, "router", None)
    if name in ("topk", "threshold", "remoe", "expert_choice", "base"):
        seen = []
        block.mlp.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        again = model(torch.tensor([LONG]), output_router_logits=True)
        expected = seen[0][0] @ router.weight.t()
        torch.testing.assert_close(again.router_logits[0], expected)
    assert model(**batch).router_logits is None


def test_inputs_are_checked():
    _, model = twins(make_run())
    tokens = torch.tensor([LONG])
    with pytest.raises(
        ValueError, match="given inputs is .*; allowed: input_ids or inputs_embeds"
    ):
        model()
    mask = torch.ones(1, 7, dtype=torch.int64)
    message = r"shape of attention_mask is \[1, 7\]; allowed: \[1, 8\]"
    with pytest.raises(ValueError, match=message):
        model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="last position is 24; allowed: 0 to 23"):
        model(torch.zeros(1, 25, dtype=torch.int64))
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)


def test_steps_train_weights_and_state_of_gates():
    """A training loop like that of transformers' Trainer, and GateUpdater after each step."""
    _, model = twins(make_run("deepseek_v3", {"topk": 2, "bias_update_speed": 0.1}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = copy.deepcopy(model)
    updater = GateUpdater(model.train(), Groups())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(VOCAB, (4, 12))
    losses = []
    for _ in range(4):
        for part in tokens.split(2):
            out = model(part, labels=part, num_items_in_batch=44)
            out.loss.backward()
        losses.append(out.loss.item())
        optimizer.step()
        optimizer.zero_grad()
        updater.post_optimizer_step()
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name
    bias = before["model.layers.0.mlp.gate.expert_bias"]
    change = model.state_dict()["model.layers.0.mlp.gate.expert_bias"] - bias
    assert change.abs().max() >= 0.1 - 1e-6
    for name, tensor in copied.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    out = copied(tokens, output_router_logits=True)
    assert len(out.router_logits) == 2
