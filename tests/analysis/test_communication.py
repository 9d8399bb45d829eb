"""Estimated communication against the collectives of real steps on two ranks."""

from __future__ import annotations

import json

import pytest

from helpers.tracked_steps import COLLECTIVES, collectives_of_a_step, planned_run
from megatron.analysis.communication import Transfer, estimate_communication
from megatron.analysis.rank_parameters import Topology

PEER = {"peer_num_heads": 2, "peer_topk": 4, "peer_query_size": 16}
RUNS = {
    "dense, ZeRO 0": {"gate": "", "zero_stage": 0, "micro_batches": 2},
    "dense, ZeRO 2": {"gate": "", "zero_stage": 2, "micro_batches": 2},
    "ZeRO 1, not sharded": {"micro_batches": 2},
    "ZeRO 1, gate with state": {"gate": "deepseek_v3", "ep_size": 2},
    "ZeRO 1, fp32, recomputed": {
        "gate": "threshold",
        "ep_size": 2,
        "bf16": False,
        "recompute": True,
        "micro_batches": 2,
    },
    "ZeRO 2, global balance": {
        "zero_stage": 2,
        "micro_batches": 2,
        "options": {"balance_scope": "global-batch"},
    },
    "ZeRO 1, recomputed with dropout": {
        "ep_size": 2,
        "recompute": True,
        "dropout": 0.1,
        "moe_shared_experts": 1,
    },
    "ZeRO 3": {"zero_stage": 3, "micro_batches": 2},
    "ZeRO 3, reduced in bf16": {"zero_stage": 3, "reduce_in_bf16": True},
    "ZeRO 3, sharded, latent rows": {
        "zero_stage": 3,
        "ep_size": 2,
        "moe_latent_size": 64,
        "recompute": True,
    },
    "PEER, recomputed": {
        "gate": "peer",
        "num_experts": 64,
        "width": 2,
        "ep_size": 2,
        "recompute": True,
        "options": PEER,
    },
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_bytes_equal_recorded_collectives(ranks2, options):
    """Exactly, by kind of collective; summed over ranks, as each receives other rows."""
    sizes = {"width": 32, "seq_length": 16, **options}
    config = planned_run(world_size=2, **sizes)
    results = ranks2.run(collectives_of_a_step, config, timeout=300)
    experts_per_token = results[0][1]
    estimate = estimate_communication(config, 2048, Topology(2, "cpu"), experts_per_token)
    for collective in COLLECTIVES.values():
        recorded = sum(sizes.get(collective, 0) for sizes, _ in results)
        assert recorded == 2 * estimate.size(collective), (collective, estimate.text())
    assert estimate.size() == sum(map(estimate.size, COLLECTIVES.values()))


def test_one_rank_communicates_nothing():
    estimate = estimate_communication(planned_run(), 2048, Topology(1, "cpu"), 2.0)
    assert estimate.transfers == ()
    assert "none" in estimate.text()


def test_ring_sends_share_of_tensor():
    """A ring of 4 ranks: 3/4 of the tensor, twice in an all-reduce."""
    assert Transfer("gradients", "all-reduce", 400, 4).sent == 600
    assert Transfer("weights", "all-gather", 400, 4).sent == 300


def test_reuse_distance_gathers_blocks_twice():
    """At ZeRO 3 a block that is not used again soon is gathered for each pass."""
    from dataclasses import replace

    from megatron.analysis import communication
    from megatron.analysis.rank_parameters import meta_model, rank_parameters, zero_options

    config = planned_run(gate="", zero_stage=3, world_size=2)
    topology = Topology(2, "cpu")
    parameters = rank_parameters(meta_model(config, 2048, topology), topology, 1)
    options = zero_options(config, 2, parameters)
    gathered = []
    for distance in (options.max_reuse_distance, 1):
        options = replace(options, max_reuse_distance=distance)
        step = communication._Step(config, 2048, topology, parameters, options, 0.0)
        transfers = {t.purpose: t.size for t in step.transfers()}
        gathered.append(transfers["weights of blocks"])
    # Blocks are above the final norm and the embedding, all of whose weights are gathered once
    # or kept on every rank.
    assert gathered[0] < gathered[1] <= 2 * gathered[0]


def test_estimate_is_text_and_json():
    config = planned_run(world_size=4, ep_size=2)
    estimate = estimate_communication(config, 2048, Topology(4, "cpu"), 2.0)
    values = json.loads(json.dumps(estimate.to_dict()))
    assert sum(t["sent"] for t in values["transfers"]) == values["sent"] == estimate.sent
    for word in (
        "expert rows: dispatch",
        "all-to-all",
        "updated weights",
        "4 ranks",
        "2 ranks",
    ):
        assert word in estimate.text()
    assert sum(value for _, _, value in estimate.chart_rows()) == estimate.sent
