"""Experts that stay dead or hot are named when that begins and when it ends."""

from megatron.training.persistent_loads import HOT_FACTOR, PERSISTENT_LINES, PersistentLoads

EVEN = [0.25] * 4


def follow(*lines):
    """The messages after each line, whose elements are the shares of layers."""
    loads = PersistentLoads()
    return [loads.update({"load_by_expert": list(line)}) for line in lines]


def test_dead_expert_is_named_once():
    dead = [0.0, 0.5, 0.5, 0.0]
    lines = [[EVEN, dead]] * (PERSISTENT_LINES + 3) + [[EVEN, [0.1, 0.4, 0.5, 0.0]]] * 2
    got = follow(*lines)
    assert got[PERSISTENT_LINES - 1] == ["layer 1: experts 0 3 had no token for 5 log lines"]
    assert got[PERSISTENT_LINES + 3] == ["layer 1: expert 0 had tokens again"]
    assert sum(map(len, got)) == 2


def test_hot_expert_is_named_once():
    """Three times the mean load exactly is not hot."""
    share = HOT_FACTOR / 8
    even = [share] + [(1 - share) / 7] * 7
    hot = [share + 0.01] + [(1 - share - 0.01) / 7] * 7
    assert sum(follow(*[[even]] * 9), []) == []
    got = follow(*[[hot]] * PERSISTENT_LINES, [even], [even])
    assert got[PERSISTENT_LINES - 1] == [
        "layer 0: expert 0 had more than 3 times the mean load for 5 log lines"
    ]
    assert got[PERSISTENT_LINES] == [
        "layer 0: expert 0 no longer had more than 3 times the mean load"
    ]
    assert sum(map(len, got)) == 2


def test_short_states_are_not_named():
    dead = [0.0, 0.5, 0.25, 0.25]
    lines = ([[dead]] * (PERSISTENT_LINES - 1) + [[EVEN]]) * 3
    assert sum(follow(*lines), []) == []


def test_lines_without_loads_change_nothing():
    """A layer without tokens, a layer that is not listed, and a run without routing metrics."""
    dead = [0.0, 0.5, 0.25, 0.25]
    loads = PersistentLoads()
    messages = []
    for _ in range(PERSISTENT_LINES):
        for shares in (dead, [0.0] * 4, None):
            messages += loads.update({"load_by_expert": [shares]})
        messages += loads.update({"loss": 1.0})
    assert messages == ["layer 0: expert 0 had no token for 5 log lines"]


def test_long_lists_are_shortened():
    shares = [0.0] * 30 + [0.5, 0.5]
    (message,) = follow(*[[shares]] * PERSISTENT_LINES)[-1][:1]
    assert message.startswith("layer 0: experts 0 1 2 ")
    assert " 19 and 10 others had no token" in message and " 20 " not in message
