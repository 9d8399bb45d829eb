"""Windows: those of the harness, overlapping ones, and every token scored once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.evaluation.windows import continuation_windows, scored_windows


@given(num_tokens=st.integers(0, 40), positions=st.integers(1, 12))
def test_windows_are_those_of_harness(num_tokens, positions):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = list(range(1, num_tokens + 1))
    rolling = get_rolling_token_windows(
        token_list=tokens, prefix_token=0, max_seq_len=positions, context_len=1
    )
    expected = [(*context, *scored) for context, scored in map(make_disjoint_window, rolling)]
    found = scored_windows(num_tokens + 1, positions)
    assert [tuple([0, *tokens][w.start : w.end]) for w in found] == expected


@given(data=st.data(), num_tokens=st.integers(0, 40), positions=st.integers(1, 12))
def test_each_token_is_scored_once(data, num_tokens, positions):
    """After as many tokens as the stride leaves in a window."""
    stride = data.draw(st.integers(1, positions))
    scored = []
    for window in scored_windows(num_tokens, positions, stride):
        first = window.end - window.num_scored
        assert 0 <= window.start < first and window.end - window.start <= positions + 1
        assert first - window.start >= min(first, positions + 1 - stride)
        scored += range(first, window.end)
    assert scored == list(range(1, num_tokens))


@given(data=st.data(), positions=st.integers(1, 12), context=st.integers(1, 30))
def test_continuation_is_scored_once(data, positions, context):
    """After its context, which is cut on the left."""
    num_scored = data.draw(st.integers(1, 30))
    total = context + num_scored
    windows = list(continuation_windows(total, num_scored, positions))
    scored = [i for w in windows for i in range(w.end - w.num_scored, w.end)]
    assert scored == list(range(context, total))
    if num_scored <= positions:
        assert [w.start for w in windows] == [max(0, total - positions - 1)]


@pytest.mark.parametrize("stride", [-1, 9])
def test_stride_outside_window_is_refused(stride):
    with pytest.raises(ValueError, match=f"--stride is {stride}; allowed: 1 to 8, the tokens"):
        list(scored_windows(20, 8, stride))
