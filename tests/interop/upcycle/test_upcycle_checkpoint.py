"""Upcycled checkpoints: their models against the dense one, sizes, seeds, and refused input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import dense_models
from megatron.checkpoint.loader import find_checkpoint
from megatron.config.checkpoint import CheckpointConfig
from megatron.interop.upcycle import scale
from megatron.interop.upcycle.convert import UpcycleResult, prepare_weights, upcycle
from megatron.interop.upcycle.dense_source import open_dense_source
from megatron.interop.upcycle.flags import parse_request
from megatron.model.gpt import GPT
from megatron.parallel.groups import Groups

DENSE_WIDTH = 48
HIDDEN = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return dense_models.write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Return (directory, model) of a dense swiglu model."""
    return make_dense(tmp_path_factory.mktemp("dense"))


def make_dense(folder: Path, **model) -> tuple[Path, GPT]:
    config = dense_models.dense_config(**model)
    built = dense_models.build(config).eval()
    return dense_models.save(built, config, folder / "checkpoints"), built


def run(directory: Path, output: Path, flags: str) -> UpcycleResult:
    """Upcycle a checkpoint as the tool does."""
    source = open_dense_source(directory)
    request = parse_request(source.config, flags.split())
    return upcycle(source, request, output)


def load(directory: Path) -> GPT:
    """Build the model of a checkpoint."""
    options = CheckpointConfig(load=str(directory), finetune=True)
    checkpoint = find_checkpoint(options, Groups(), required=True)
    model = dense_models.build(checkpoint.metadata.config)
    checkpoint.load_weights(model, Groups())
    return model.eval()


def difference(first: GPT, second: GPT) -> float:
    """Return the largest difference of logits for random tokens."""
    tokens = torch.randint(257, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (first(tokens).logits - second(tokens).logits).abs().max().item()


def with_sample(flags: str, text: Path) -> str:
    if "coactivation" in flags or "gradient" in flags or "centroids" in flags:
        return f"{flags} --sample-data {text} --sample-tokens 300"
    return flags


@pytest.mark.parametrize(
    "flags",
    [
        "--num-experts 4 --topk 2",
        "--num-experts 3 --topk 3 --scale-in weights",
        "--num-experts 8 --granularity 4 --topk 4",
        "--num-experts 8 --granularity 2 --topk 4 --scale-in weights",
        "--num-experts 8 --granularity 2 --topk 2 --gate deepseek_v3",
        "--num-experts 4 --topk 2 --moe-layers 1",
        "--num-experts 4 --topk 2 --expert-interval 2 --granularity 2",
        "--num-experts 4 --gate threshold --threshold 0.6",
        "--num-experts 4 --topk 2 --expert-linear-bias",
        "--num-experts 4 --gate topk@0,hash@1 --topk.topk 2 --topk.norm-topk-prob",
    ],
)
def test_copies_compute_what_the_dense_model_does(dense, tmp_path, flags):
    """Also with k below E: granular experts are chosen as complete copies."""
    directory, model = dense
    result = run(directory, tmp_path / "moe", flags)
    assert difference(load(tmp_path / "moe"), model) < 1e-5
    assert result.description == "the MoE layers compute what the dense ones do"


SPLIT_FLAGS = [
    "--strategy sequential",
    "--strategy random",
    "--strategy kmeans",
    "--strategy kmeans --router-init centroids",
    "--strategy coactivation",
    "--strategy gradient",
    "--strategy gradient --router-init centroids",
]


@pytest.mark.parametrize("shared", [0, 16])
@pytest.mark.parametrize("flags", SPLIT_FLAGS)
def test_all_experts_equal_the_dense_model(dense, tmp_path, text, flags, shared):
    """With all experts chosen and equal weights, scale E: the split is exact."""
    directory, model = dense
    flags = with_sample(f"{flags} --num-experts 4 --topk 4 --shared-neurons {shared}", text)
    run(directory, tmp_path / "moe", flags)
    moe = load(tmp_path / "moe")
    for block in moe.layers:
        assert block.mlp.gate.config.routed_scaling_factor == pytest.approx(4)
        torch.nn.init.zeros_(block.mlp.gate.router.weight)
    assert difference(moe, model) < 1e-5


@pytest.mark.parametrize("gate", ["", "--moe-shared-expert-gate"])
def test_shared_expert_has_the_remaining_neurons(dense, tmp_path, gate):
    directory, model = dense
    flags = f"--num-experts 4 --strategy random --shared_neurons=8 --topk 4 {gate}"
    result = run(directory, tmp_path / "moe", flags)
    moe = load(tmp_path / "moe")
    for block in moe.layers:
        assert block.mlp.shared.up_proj.weight.shape == (8, HIDDEN)
        assert block.mlp.experts.w1.shape == (4, 10, HIDDEN)
        torch.nn.init.zeros_(block.mlp.gate.router.weight)
    assert difference(moe, model) < 1e-5
    router = HIDDEN * (5 if gate else 4)
    assert result.moe_size.total == result.dense_size.total + 2 * router


@pytest.mark.parametrize("flags", ["--topk 2", "--strategy random --topk 4"])
def test_layers_without_gate_projection_are_exact(tmp_path, flags):
    directory, model = make_dense(tmp_path, activation="gelu")
    run(directory, tmp_path / "moe", f"--num-experts 4 {flags} --init-method-std 1e-7")
    moe = load(tmp_path / "moe")
    assert "w3" not in dict(moe.layers[0].mlp.experts.named_parameters())
    assert difference(moe, model) < 1e-5


def test_factor_is_the_number_of_slices_per_weight(dense, tmp_path):
    """E / k for each of k chosen experts: E with weights that add up to 1."""
    directory, _ = dense
    result = run(directory, tmp_path / "split", "--strategy random --num-experts 4 --topk 2")
    options = result.config.gate_options["topk"]
    assert options["norm_topk_prob"]
    assert options["routed_scaling_factor"] == pytest.approx(4)
    result = run(
        directory,
        tmp_path / "softmax",
        "--strategy random --num-experts 4 --topk 2 --no-norm-topk-prob",
    )
    options = result.config.gate_options["topk"]
    assert options["routed_scaling_factor"] == pytest.approx(8, rel=1e-4)
    result = run(
        directory, tmp_path / "none", "--strategy random --num-experts 4 --topk 2 --scale none"
    )
    assert result.config.gate_options["topk"]["routed_scaling_factor"] == 1


def test_factor_that_a_flag_sets_is_kept(dense, tmp_path):
    """The rest is in the weights, so that the layer is exact all the same."""
    directory, model = dense
    flags = "--num-experts 4 --topk 2 --routed-scaling-factor 2.5"
    result = run(directory, tmp_path / "moe", flags)
    assert result.config.gate_options["topk"]["routed_scaling_factor"] == 2.5
    assert difference(load(tmp_path / "moe"), model) < 1e-5


def test_sizes_are_exact(dense, tmp_path):
    directory, model = dense
    dense_total = sum(p.numel() for p in model.parameters())
    ffn = 3 * HIDDEN * DENSE_WIDTH
    cases = {
        "--num-experts 4 --topk 2": (4 * ffn, 2 * ffn, 4),
        "--num-experts 8 --granularity 2 --topk 2": (4 * ffn, ffn, 8),
        "--num-experts 4 --topk 3 --strategy random": (ffn, 3 * ffn // 4, 4),
    }
    for number, (flags, (stored, active, experts)) in enumerate(cases.items()):
        result = run(directory, tmp_path / str(number), flags)
        router = experts * HIDDEN
        rest = dense_total - 2 * ffn
        assert result.dense_size.total == dense_total
        assert result.moe_size.total == rest + 2 * (stored + router)
        assert result.moe_size.active_min == rest + 2 * (active + router)
        assert result.moe_size.active_max == result.moe_size.active_min
        built = load(tmp_path / str(number))
        assert sum(p.numel() for p in built.parameters()) == result.moe_size.total


def test_other_weights_are_bit_identical(dense, tmp_path):
    directory, model = dense
    run(directory, tmp_path / "moe", "--num-experts 4 --topk 2 --moe-layers 1")
    moe = load(tmp_path / "moe").state_dict()
    for name, weight in model.state_dict().items():
        if not name.startswith("layers.1.mlp."):
            assert torch.equal(moe[name], weight), name
    for e in range(4):
        for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            expert = moe[f"layers.1.mlp.experts.{ours}"][e]
            assert torch.equal(expert, model.state_dict()[f"layers.1.mlp.{theirs}_proj.weight"])


@pytest.mark.parametrize("flags", ["--noise-std 0.01", "--drop-ratio 0.5"])
def test_changed_copies_differ_and_are_described(dense, tmp_path, flags):
    directory, model = dense
    result = run(directory, tmp_path / "moe", f"--num-experts 4 --topk 2 {flags}")
    experts = load(tmp_path / "moe").layers[0].mlp.experts.w1
    assert not torch.equal(experts[0], experts[1])
    assert "the MoE layers differ from the dense ones by the" in result.description.replace(
        "their noise", "the noise"
    )


EVERYTHING = "--num-experts 4 --topk 2 --strategy kmeans --noise-std 0.1 --drop-ratio 0.3"


def test_values_do_not_depend_on_ranges(dense):
    """Ranges of any size, in any order, are those of the full tensors: shards do not matter."""
    source = open_dense_source(dense[0])
    weights = prepare_weights(source, parse_request(source.config, EVERYTHING.split()))
    other = prepare_weights(source, parse_request(source.config, EVERYTHING.split()))
    generator = torch.Generator().manual_seed(0)
    for name in sorted(weights.shapes, reverse=True):
        numel = torch.Size(weights.shapes[name]).numel()
        full = weights.read(name, 0, numel)
        assert full.dtype == torch.float32 and len(full) == numel
        for _ in range(4):
            start, stop = sorted(torch.randint(numel + 1, (2,), generator=generator).tolist())
            assert torch.equal(other.read(name, start, stop - start), full[start:stop]), name


def test_seed_decides_what_is_random(dense):
    source = open_dense_source(dense[0])

    def expert(seed: int) -> torch.Tensor:
        flags = f"{EVERYTHING} --seed {seed}".split()
        weights = prepare_weights(source, parse_request(source.config, flags))
        return weights.read("layers.0.mlp.experts.w2", 0, 500)

    assert torch.equal(expert(1), expert(1))
    assert not torch.equal(expert(1), expert(2))


def test_run_json_does_not_name_the_dense_run(dense, tmp_path):
    directory, _ = dense
    result = run(directory, tmp_path / "moe", "--num-experts 8 --granularity 2 --topk 2")
    assert result.config.checkpoint == CheckpointConfig()
    assert result.config.moe.moe_ffn_hidden_size == DENSE_WIDTH // 2
    assert result.path == tmp_path / "moe" / "iter_0000000"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--num-experts is 0; allowed: a positive number"),
        (
            "--num-experts 5 --strategy random",
            "--num-experts is 5; allowed: a divisor of the 48",
        ),
        (
            "--num-experts 4 --granularity 3",
            "--num-experts is 4; allowed: a multiple of --gran",
        ),
        (
            "--num-experts 10 --granularity 5",
            "--granularity is 5; allowed: a divisor of the dense",
        ),
        ("--num-experts 4 --topk 5", "--topk is 5; allowed: 1 to the number of experts"),
        ("--num-experts 4 --strategy best", "--strategy is 'best'; allowed: copy sequential"),
        (
            "--num-experts 4 --strategy gradient",
            "--strategy is 'gradient'; allowed: .* without --sample-data",
        ),
        (
            "--gate peer --peer-num-experts 16",
            "--gate is 'peer'; allowed: a gate whose experts are MLPs",
        ),
        ("--num-experts 4 --hidden-size 64", "--hidden-size is 64; allowed: 32, as the dense"),
        ("--num-experts 4 --moe-ffn-hidden-size 7", "--moe-ffn-hidden-size is 7; allowed: 48"),
        ("--num-experts 4 --expert-type swiglu_clamped", "--expert-type is 'swiglu_clamped'"),
        ("--num-experts 4 --moe-latent-size 8", "--moe-latent-size is 8; allowed: none"),
        (
            "--num-experts 4 --moe-weight-on-input",
            "--moe-weight-on-input is True; allowed: off",
        ),
        (
            "--num-experts 4 --moe-shared-experts 1",
            "--moe-shared-experts is 'set'; allowed: left",
        ),
        ("--num-experts 4 --shared-neurons 8", "--shared-neurons .* only with --strategy"),
        (
            "--num-experts 4 --strategy random --granularity 2",
            "--granularity .* --strategy copy",
        ),
        (
            "--num-experts 4 --router-init centroids",
            "--router-init is 'centroids'; allowed: noise",
        ),
        (
            "--num-experts 4 --sample-data x.jsonl",
            "--sample-data is 'x.jsonl'; allowed: only with",
        ),
        ("--num-experts 4 --drop-ratio 1.5", "--drop-ratio is 1.5; allowed: 0 to 1"),
        ("--num-experts 4 --noise-std -1", "--noise-std is -1.0; allowed: 0 or more"),
        (
            "--num-experts 4 --strategy random --shared-neurons 48",
            "--shared-neurons is 48; allowed: less than the dense width 48",
        ),
        (
            "--num-experts 4 --gate cosine --granularity 2",
            "--granularity is 2; .* Gate cosine has another router",
        ),
        (
            "--num-experts 4 --strategy kmeans --router-init centroids --gate cosine",
            "--router-init is 'centroids'; .* Gate cosine has another router",
        ),
    ],
)
def test_wrong_flags_are_refused(dense, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(dense[0], tmp_path / "moe", flags)
    assert not (tmp_path / "moe").exists()


def test_gate_without_positive_weights_is_refused(dense, tmp_path, monkeypatch):
    """Such as a gate outside the tree with signed weights; no gate in the tree does that."""
    monkeypatch.setattr(scale, "uniform_weight_sum", lambda gate: -0.5)
    flags = "--num-experts 4 --topk 2"
    with pytest.raises(ValueError, match="weights of gate topk is -0.5; .* Set --scale none"):
        run(dense[0], tmp_path / "moe", flags)
    run(dense[0], tmp_path / "moe", f"{flags} --scale none")


def test_moe_model_is_refused(dense, tmp_path):
    run(dense[0], tmp_path / "moe", "--num-experts 4 --topk 2 --gate deepseek_v3")
    with pytest.raises(
        ValueError, match="is 4; allowed: 0, a dense model. .* gate deepseek_v3"
    ):
        open_dense_source(tmp_path / "moe")


def test_existing_output_is_refused(dense, tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "file").touch()
    with pytest.raises(ValueError, match="allowed: a new or an empty directory"):
        run(dense[0], tmp_path / "moe", "--num-experts 4")
    assert [path.name for path in (tmp_path / "moe").iterdir()] == ["file"]


def test_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is not a directory of checkpoints"):
        open_dense_source(tmp_path / "nothing")
