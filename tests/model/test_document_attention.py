"""Attention within documents: index arithmetic, values, gradients, dropout and memory."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from benchmarks import report
from megatron.model import document_attention as subject
from megatron.model.attend import ScoreOptions
from megatron.model.document_attention import DocumentLayout

# Lengths of the documents of each sample.
PACKED = {
    "one token each": [[1] * 9, [1] * 9],
    "one document": [[9], [9]],
    "short first and last": [[1, 7, 1], [4, 4, 1]],
    "equal lengths": [[3, 3, 3], [3, 3, 3]],
    "padding in each": [[5, 7], [7, 5]],
    "one sample": [[2, 11, 5, 1, 1, 14]],
    "one token": [[1]],
    "longer than padding": [[300, 257, 13], [256, 1, 313]],
}


def segments_of(samples: list[list[int]]) -> torch.Tensor:
    """Return numbers of documents that start again at 0 in each sample."""
    rows = []
    for lengths in samples:
        rows.append(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))
    return torch.stack(rows)


def dense_mask(segments: torch.Tensor) -> torch.Tensor:
    """Compare all pairs of tokens [B, 1, S, S]; for documents with different numbers."""
    return (segments[:, :, None] == segments[:, None, :]).tril()[:, None]


def draw(segments, heads, groups, size, dtype):
    """Return queries, keys, values and an upstream gradient."""
    g = torch.Generator().manual_seed(7)
    B, S = segments.shape
    shapes = [(B, count, S, size) for count in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def with_gradients(attention, q, k, v, upstream):
    """Return the output of `attention(q, k, v)` and the gradients of q, k and v."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = attention(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def reference(q, k, v, mask):
    """Attend in the dtype of the inputs with plain operations."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("name", PACKED)
def test_layout_equals_a_loop(name):
    layout = DocumentLayout(segments_of(PACKED[name]) + 4)
    lengths = sum(PACKED[name], [])
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert layout.starts_N.tolist() == starts and layout.lengths_N.tolist() == lengths
    assert layout.offsets_N1.tolist() == [*starts, sum(lengths)]
    assert layout.offsets_N1.dtype == torch.int32 and layout.longest == max(lengths)
    assert torch.equal(layout.mask_B1SS, dense_mask(layout.segments_BS))


@pytest.mark.parametrize("name", [name for name in PACKED if name != "one document"])
def test_batches_hold_each_document_once(name):
    layout = DocumentLayout(segments_of(PACKED[name]))
    if name == "one token":
        assert layout.batches is None
        return
    token_P, row_T, shapes = layout.batches
    assert torch.equal(token_P[row_T], torch.arange(len(row_T)))
    rows = iter(token_P.tolist())
    found = []
    for count, padded in shapes:
        for _ in range(count):
            tokens = [next(rows) for _ in range(padded)]
            length = len(set(tokens))
            assert tokens == [*range(tokens[0], tokens[0] + length)] + [tokens[-1]] * (
                padded - length
            )
            assert padded == length or padded < 1.5 * length and length < 256
            found.append((tokens[0], length))
    assert next(rows, None) is None
    expected = zip(layout.starts_N.tolist(), layout.lengths_N.tolist(), strict=True)
    assert sorted(found) == list(expected)
    assert len({padded for _, padded in shapes}) == len(shapes)


def test_samples_of_one_document_are_not_copied():
    assert DocumentLayout(segments_of([[9], [9]])).batches is None


def test_equal_numbers_are_separated_by_another():
    """Neighbours form documents, so a number may be used again; equally on all paths."""
    layout = DocumentLayout(torch.tensor([[0, 0, 1, 0, 0, 0]]))
    assert layout.lengths_N.tolist() == [2, 1, 3]
    assert torch.equal(layout.mask_B1SS, dense_mask(torch.tensor([[0, 0, 1, 2, 2, 2]])))


def tolerance(q, k, size, length, dtype):
    """Bound the relative error of attention by its roundings.

    Scores have `size` + 2 roundings and change weights by as many units times their own size;
    weights and values are summed over `length` keys. Gradients contain products of two of these.
    """
    largest_score = (q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) / size**0.5
    roundings = (size + 2) * max(1.0, float(largest_score)) + length
    if dtype == torch.bfloat16:
        # Products are accumulated in fp32: inputs, weights, outputs and gradients are rounded.
        roundings = 4 + max(1.0, float(largest_score))
    return 2 * roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads, groups", [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("name", PACKED)
def test_batches_equal_dense_mask(name, heads, groups, dtype, monkeypatch):
    """Values and gradients agree with an fp64 computation over all pairs of tokens."""
    monkeypatch.setattr(subject, "longest_masked", lambda dtype: 0)
    segments = segments_of(PACKED[name])
    q, k, v, upstream = draw(segments, heads, groups, 8, dtype)
    layout = DocumentLayout(segments)
    ours = with_gradients(
        lambda q, k, v: subject.document_attention(q, k, v, layout, ScoreOptions()),
        q,
        k,
        v,
        upstream,
    )
    mask = dense_mask(segments)
    expected = with_gradients(
        lambda q, k, v: reference(q, k, v, mask), *(x.double() for x in (q, k, v, upstream))
    )
    close = tolerance(q, k, 8, layout.longest, dtype)
    for actual, exact in zip(ours, expected, strict=True):
        assert actual.dtype == dtype
        difference = (actual.double() - exact).abs().max()
        assert difference <= close * exact.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("dtype, longest", [(torch.float32, 64), (torch.bfloat16, 256)])
def test_short_samples_use_a_mask(dtype, longest):
    for length, masked in ((longest, True), (longest + 1, False)):
        layout = DocumentLayout(segments_of([[3, length - 3]]))
        subject.document_attention(
            *draw(layout.segments_BS, 1, 1, 8, dtype)[:3], layout, ScoreOptions()
        )
        assert ("mask_B1SS" in vars(layout)) == masked
        assert ("batches" in vars(layout)) != masked


def test_dropout_has_the_same_distribution(monkeypatch):
    """With the identity as values, the output is the weights: dropped or scaled by 1 / (1 - p)."""
    monkeypatch.setattr(subject, "longest_masked", lambda dtype: 0)
    segments = segments_of([[1, 5, 7, 3]])
    S, draws, p = 16, 2000, 0.25
    q, k, _, _ = draw(segments, 1, 1, S, torch.float32)
    expected = reference(q, k, torch.eye(S)[None, None], dense_mask(segments))
    q, k = (x.expand(draws, -1, -1, -1) for x in (q, k))
    v = torch.eye(S).expand(draws, 1, S, S)
    torch.manual_seed(3)
    layout = DocumentLayout(segments.expand(draws, -1))
    weights = subject.document_attention(q, k, v, layout, ScoreOptions(p))
    kept = weights != 0
    assert not kept[:, ~(expected[0] > 0)].any()
    scaled = (expected / (1 - p)).expand_as(weights)
    torch.testing.assert_close(weights[kept], scaled[kept])
    # Six standard deviations of the mean of `draws` samples.
    share = kept[:, expected[0] > 0].float().mean(0)
    assert (share - (1 - p)).abs().max() < 6 * (p * (1 - p) / draws) ** 0.5


@pytest.mark.parametrize("lengths", [[1] * 512, [130, 126, 1, 255], [512]])
def test_memory_is_linear_in_length(lengths, monkeypatch):
    """Eight times the documents take eight times the memory, also as one long document.

    One byte for each pair of tokens would be more than all else together.
    """
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")  # silences torch's profiler
    bytes_of = {}
    for times in (1, 8):
        packed = lengths * times if len(lengths) > 1 else [lengths[0] * times]
        segments = segments_of([packed])
        inputs = draw(segments, 1, 1, 8, torch.float32)

        def attend(segments=segments, inputs=inputs):
            layout = DocumentLayout(segments)
            return with_gradients(
                lambda q, k, v: subject.document_attention(q, k, v, layout, ScoreOptions()),
                *inputs,
            )

        bytes_of[times] = report.peak_bytes(attend)
    assert 0 < bytes_of[8] <= 8.1 * bytes_of[1]
    assert bytes_of[8] < 4096**2 / 2


def reference_varlen(q, k, v, offsets_q, offsets_k, longest_q, longest_k, **options):
    """Attend as torch's varlen_attn, one document at a time."""
    assert offsets_q.dtype == offsets_k.dtype == torch.int32
    assert options.pop("scale") is None
    before, after = options.pop("window_size")
    assert after == 0 and options == {"enable_gqa": q.shape[1] != k.shape[1]}
    assert longest_q == longest_k == int(torch.diff(offsets_q).max())
    outputs = []
    for start, stop in zip(offsets_q[:-1].tolist(), offsets_q[1:].tolist(), strict=True):
        document = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        mask = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        if before >= 0:
            mask = mask.triu(-before)
        outputs.append(reference(*document, mask)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("heads, groups, window", [(2, 2, 0), (6, 2, 0), (6, 2, 3)])
@pytest.mark.parametrize("name", PACKED)
def test_varlen_gets_rows_and_offsets(name, heads, groups, window, monkeypatch):
    """The kernel for GPUs is replaced by a loop over the offsets that it gets."""
    monkeypatch.setattr(varlen, "varlen_attn", reference_varlen)
    monkeypatch.setattr(subject, "can_use_varlen", lambda q, dropout: True)
    segments = segments_of(PACKED[name])
    inputs = draw(segments, heads, groups, 8, torch.float64)
    layout = DocumentLayout(segments)
    options = ScoreOptions(window=window)
    ours = with_gradients(
        lambda q, k, v: subject.document_attention(q, k, v, layout, options), *inputs
    )
    mask = dense_mask(segments)
    if window:
        mask = mask.triu(1 - window)
    expected = with_gradients(lambda q, k, v: reference(q, k, v, mask), *inputs)
    for actual, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize(
    "changes, usable",
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"is_cuda": False}, False),
        ({"size": 20}, False),
        ({"size": 264}, False),
        ({"dropout": 0.1}, False),
        ({"capability": (7, 5)}, False),
        ({"flash": False}, False),
    ],
)
def test_varlen_needs_kernel_and_inputs(changes, usable, monkeypatch):
    case = {
        "dtype": torch.bfloat16,
        "is_cuda": True,
        "size": 64,
        "dropout": 0.0,
        "capability": (8, 0),
        "flash": True,
        **changes,
    }
    monkeypatch.setattr(
        torch.backends.cuda, "is_flash_attention_available", lambda: case["flash"]
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: case["capability"])
    q = SimpleNamespace(
        is_cuda=case["is_cuda"], dtype=case["dtype"], shape=(1, 2, 3, case["size"]), device=None
    )
    assert subject.can_use_varlen(q, case["dropout"]) == usable


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("name", PACKED)
def test_varlen_kernel_equals_batches(name, window, monkeypatch):
    options = ScoreOptions(window=window)
    segments = segments_of(PACKED[name]).cuda()
    inputs = [x.cuda() for x in draw(segments, 4, 2, 64, torch.bfloat16)]
    results = []
    for use_varlen in (True, False):
        if use_varlen:
            assert subject.can_use_varlen(inputs[0], 0.0)
        else:
            monkeypatch.setattr(subject, "can_use_varlen", lambda q, dropout: False)
            monkeypatch.setattr(subject, "longest_masked", lambda dtype: 0)
        layout = DocumentLayout(segments)
        results.append(
            with_gradients(
                lambda q, k, v, layout=layout: subject.document_attention(
                    q, k, v, layout, options
                ),
                *inputs,
            )
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_grouped_queries_share_keys_in_order():
    """Query heads 0 to H/G - 1 use the first key head, as in plain attention."""
    segments = segments_of([[70, 30]])
    q, k, v, _ = draw(segments, 4, 2, 8, torch.float64)
    layout = DocumentLayout(segments)
    ours = subject.document_attention(q, k, v, layout, ScoreOptions())
    for head in range(4):
        alone = F.scaled_dot_product_attention(
            q[:, head : head + 1],
            k[:, head // 2 : head // 2 + 1],
            v[:, head // 2 : head // 2 + 1],
            attn_mask=dense_mask(segments),
        )
        torch.testing.assert_close(ours[:, head : head + 1], alone)
