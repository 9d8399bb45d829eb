"""When the engine lets MoE layers measure the details of their routings."""

from helpers import engines
from helpers.engines import config_of


def _measured(config):
    """In a rank: whether details are there, by what the engine does."""
    from megatron.training.task import NextTokenLoss

    run = engines.Run(config)
    engine = run.engine
    task = NextTokenLoss()
    found = {}
    try:
        for logged in (False, True):
            engine.step(engines.micro_batches(0, run.groups), task, 0.0, 0.0, logged)
            found[f"logged {logged}"] = "router_entropy" in engine.metrics.read()
        (batch, *_) = engines.micro_batches(0, run.groups)
        with engine.evaluating() as model:
            model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
            counted = engine.metrics.layers[0].counters[False]
            found["tasks"] = "router_entropy_sum" in counted and "tokens" in counted
        engine.evaluate([batch], task, 0.0)
        found["evaluation"] = "router_entropy" in engine.metrics.read(training=False)
        return found
    finally:
        run.close()


def test_details_are_measured_where_they_are_logged(ranks1):
    """In steps with a log line and in evaluations, but not while tasks are evaluated."""
    (found,) = ranks1.run(_measured, config_of("topk", 1, 1))
    assert found == {
        "logged False": False,
        "logged True": True,
        "tasks": False,
        "evaluation": True,
    }
