"""Training with frozen parameters at every ZeRO stage against torch's own AdamW."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers import engines
from helpers.reference_training import reference_training
from megatron.config.schema import OptimizerConfig, RunConfig
from megatron.engine import frozen
from megatron.engine.zero_shards import GlobalLayout
from megatron.moe.gate import available_gates
from megatron.parallel.groups import Groups

# Regular expressions for the names of frozen parameters.
FROZEN = {
    "dense": r"q_proj|down_proj$",
    "one layer's experts": r"layers\.1\.mlp\.experts\.",
    "all experts": r"\.experts\.",
    "gates": r"\.gate\.",
    "embedding": "embed",
    "all but the last norm": r"^(?!norm\.weight$)",
    "all but a gate": r"^(?!layers\.1\.mlp\.gate)",
    "all but experts": r"^(?!.*\.experts\.)",
}
STEPS = 3


def _train(config: RunConfig, pattern: str, save: str):
    """Train in a rank.

    Returns:
        Losses, gradient norm, and the number of elements with optimizer state on this rank.
    """
    run = engines.Run(
        replace(config, checkpoint=replace(config.checkpoint, save=save)), 7, pattern
    )
    try:
        losses = run.steps(STEPS)
        run.save()
        states = run.engine.zero_shards().shards
        return losses, run.engine.grad_norm(), sum(shard.length for shard in states)
    finally:
        run.close()


TOPOLOGIES = [  # (gate, ZeRO stage, ranks, expert-parallel size)
    ("", 0, 2, 1),
    ("topk", 1, 1, 1),
    ("topk", 1, 2, 2),
    ("topk", 2, 2, 1),
    ("topk", 2, 2, 2),
    ("topk", 3, 2, 1),
    ("topk", 3, 2, 2),
]


def cases() -> list:
    """Every set of frozen parameters in every topology; most are slow tests."""
    found = []
    for name in FROZEN:
        for topology in TOPOLOGIES:
            if not topology[0] and ("expert" in name or "gate" in name):
                continue
            fast = topology in (TOPOLOGIES[0], TOPOLOGIES[2], TOPOLOGIES[-1])
            marks = () if fast else pytest.mark.slow
            found.append(pytest.param(name, *topology, marks=marks))
    return found


@pytest.mark.parametrize("name, gate, stage, ranks, ep_size", cases())
def test_training_equals_torch(name, gate, stage, ranks, ep_size, request, tmp_path):
    """Losses, norm and weights agree; frozen weights are equal and have no optimizer state."""
    pattern = FROZEN[name]
    config = engines.config_of(gate, ep_size, stage)
    pool = request.getfixturevalue(f"ranks{ranks}")
    answers = pool.run(_train, config, pattern, str(tmp_path))
    losses, norm, expected = reference_training(config, STEPS, pattern)
    tensors = engines.full_tensors(tmp_path)
    before = dict(engines.build(config).named_parameters())
    frozen_names = set(engines.frozen_names(engines.build(config), pattern))
    assert answers[0][0] == pytest.approx(losses, abs=1e-5)
    if stage:  # DeepSpeed computes no norm without ZeRO in fp32
        assert answers[0][1] == pytest.approx(norm, rel=1e-4)
    for key, weight in expected.items():
        torch.testing.assert_close(tensors[f"weight/{key}"], weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(tensors[f"weight/{key}"], before[key]) == (key in frozen_names)
        assert (f"exp_avg/{key}" in tensors) == (key not in frozen_names)
    trained = sum(weight.numel() for key, weight in expected.items() if key not in frozen_names)
    copies = 1 if stage else ranks
    assert sum(number for _, _, number in answers) == copies * trained


@pytest.mark.parametrize(
    "name, stage",
    [
        ("dense", 0),
        ("all experts", 1),
        ("all but experts", 1),
        ("one layer's experts", 2),
        ("gates", 2),
        ("embedding", 3),
        ("gates", 3),
        ("all but a gate", 3),
    ],
)
def test_bf16_keeps_frozen_weights_exact(name, stage, ranks2, tmp_path):
    """A checkpoint has the fp32 weights from before rounding, bit by bit."""
    config = engines.config_of("topk" if stage else "", 2 if stage else 1, stage, "bf16")
    answers = ranks2.run(_train, config, FROZEN[name], str(tmp_path))
    losses, norm, _ = reference_training(config, STEPS, FROZEN[name])
    assert answers[0][0] == pytest.approx(losses, abs=0.1)
    assert answers[0][1] == pytest.approx(norm, rel=0.1)
    tensors = engines.full_tensors(tmp_path)
    model = engines.build(config)
    frozen_names = engines.frozen_names(model, FROZEN[name])
    assert frozen_names
    for key, weight in model.named_parameters():
        assert torch.equal(tensors[f"weight/{key}"], weight) == (key in frozen_names)


def _kept_elements(config: RunConfig, pattern: str, representable: bool) -> tuple[int, int]:
    """Return the elements of frozen shards of this rank, and those with an fp32 copy."""
    run = engines.Run(config, 7, pattern, representable=representable)
    shards = run.engine.frozen_weights.shards
    run.close()
    kept = [shard for shard in shards if shard.exact is not None]
    return sum(s.length for s in shards), sum(s.length for s in kept)


@pytest.mark.parametrize("stage", [1, 3])
def test_fp32_copies_are_kept_if_needed(stage, ranks2):
    """Only tensors that bf16 does not represent have copies, divided over the ranks."""
    pattern = r"q_proj|\.gate\."
    config = engines.config_of("topk", 2, stage, "bf16")
    model = engines.build(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    number = sum(sizes[name] for name in engines.frozen_names(model, pattern))
    gates = sum(size for name, size in sizes.items() if ".gate." in name)
    answers = ranks2.run(_kept_elements, config, pattern, False)
    assert [sum(column) for column in zip(*answers)] == [number, number - gates]
    assert max(answers)[0] <= number // 2 + 4
    answers = ranks2.run(_kept_elements, config, pattern, True)
    assert [sum(column) for column in zip(*answers)] == [number, 0]


def _change_frozen_weight(config: RunConfig, pattern: str) -> bool:
    """Return whether shards give the weights of the model after these were changed."""
    run = engines.Run(config, 7, pattern)
    shards = run.engine.frozen_weights.shards
    assert any(shard.exact is not None for shard in shards)
    for shard in shards:
        shard.model.mul_(2.0)
    run.close()
    return all(torch.equal(shard.weight(), shard.model.float()) for shard in shards)


@pytest.mark.parametrize("stage", [1, 3])
def test_changed_frozen_weight_is_saved(stage, ranks2):
    """A program may set frozen weights itself, such as a moving average."""
    config = engines.config_of("topk", 2, stage, "bf16")
    assert ranks2.run(_change_frozen_weight, config, "q_proj") == [True, True]


def _train_gate(config: RunConfig, pattern: str):
    """Train three steps; return names of tensors that changed, and of frozen parameters."""
    run = engines.Run(config, 7, pattern)
    before = run.local_weights()
    run.steps(STEPS)
    after = run.local_weights()
    parameters = dict(run.engine.model.named_parameters())
    run.close()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return changed, {name for name, p in parameters.items() if not p.requires_grad}


@pytest.mark.parametrize("gate", available_gates())
def test_every_gate_can_be_frozen(gate, ranks2):
    config = engines.config_of(gate, 2, 3, "bf16")
    for changed, frozen_names in ranks2.run(_train_gate, config, r"\.gate\.|\.experts\."):
        assert frozen_names and not changed & frozen_names
        assert any("q_proj" in name for name in changed)


def test_frozen_gate_keeps_its_state(ranks2):
    """Expert biases would change what frozen weights select; those of trained gates move."""
    config = engines.config_of("deepseek_v3", 2, 1)
    for changed, _ in ranks2.run(_train_gate, config, r"layers\.1\.mlp\.gate\."):
        assert {name for name in changed if ".gate." in name} == {
            "layers.0.mlp.gate.expert_bias",
            "layers.0.mlp.gate.router.weight",
        }


def _recompute(config: RunConfig, pattern: str) -> list[float]:
    run = engines.Run(config, 7, pattern)
    run.engine.model.recompute = True
    losses = run.steps(STEPS)
    run.close()
    return losses


@pytest.mark.parametrize("name", ["embedding", "all but a gate", "all experts"])
def test_recomputation_under_zero3_equals_torch(name, ranks2):
    config = engines.config_of("topk", 2, 3)
    losses, _, _ = reference_training(config, STEPS, FROZEN[name])
    assert ranks2.run(_recompute, config, FROZEN[name])[0] == pytest.approx(losses, abs=1e-5)


def test_output_layer_alone_is_trained(ranks2):
    model = replace(engines.MODEL, untie_embeddings_and_output_weights=True)
    pattern = r"^(?!lm_head)"
    for stage in (1, 3):
        config = replace(engines.config_of("topk", 2, stage), model=model)
        losses, _, _ = reference_training(config, STEPS, pattern)
        answers = ranks2.run(_recompute, config, pattern)
        assert answers[0] == pytest.approx(losses, abs=1e-5)


def _freeze_everything(config: RunConfig) -> None:
    engines.Run(config, 7, "")


def test_frozen_model_is_refused(ranks2):
    with pytest.raises(
        RuntimeError,
        match="ValueError: the number of trained parameters is 0; allowed: 1 or more. Leave",
    ):
        ranks2.run(_freeze_everything, engines.config_of("topk", 2, 1))


def test_layout_divides_frozen_parameters():
    """Ranks that hold the same elements share them: with EP 2, every second rank for experts."""
    config = engines.config_of("topk", 1, 1)
    model = engines.build(config)
    engines.freeze(model, r"experts\.w1|norm\.weight")
    layout = GlobalLayout.of(model, Groups(rank=5, world_size=8, ep_size=2))
    assert set(layout.frozen) == set(engines.frozen_names(model, r"experts\.w1|norm\.weight"))
    for name, place in layout.frozen.items():
        assert place == ((2, 4) if ".experts." in name else (5, 8))
    assert set(layout.shapes) == {name for name, _ in model.named_parameters()}


def test_patch_of_deepspeed_is_removed():
    """Also when DeepSpeed fails to start."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._configure_optimizer
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="fails"), frozen.allow_frozen_parameters(model, 1):
        assert DeepSpeedEngine._configure_optimizer is not original
        raise RuntimeError("fails")
    assert DeepSpeedEngine._configure_optimizer is original
    with frozen.allow_frozen_parameters(model, 3):
        assert DeepSpeedEngine._configure_optimizer is original


def test_norm_without_tensors_is_zero():
    """BF16_Optimizer computes it outside experts, when only experts are trained."""
    assert float(frozen._norm_of_tensors([])) == 0.0
    assert float(frozen._norm_of_tensors([torch.tensor([3.0, 4.0])])) == 5.0


def test_weight_decay_default_is_not_zero():
    """Otherwise the comparison with torch could not tell decayed parameters."""
    assert OptimizerConfig().weight_decay > 0
