"""Memory that is used again: whose it is, and how much is kept."""

import gc

import pytest
import torch

from megatron import buffers

CPU, MB = torch.device("cpu"), 2**20


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    buffers.release()
    yield
    buffers.release()


def test_memory_is_used_again_and_by_one_tensor_at_a_time():
    a = buffers.empty((1024, 1024), torch.bfloat16, CPU)
    assert (
        a.shape == (1024, 1024)
        and a.dtype == torch.bfloat16
        and a.is_contiguous()
        and a.data_ptr() % 64 == 0
    )
    b = buffers.empty((512, 1024), torch.float32, CPU)
    a.fill_(1), b.fill_(2)
    assert (a == 1).all() and (b == 2).all() and buffers.idle_bytes() == 0
    first = a.data_ptr()
    row = a[3:5]
    del a
    assert buffers.idle_bytes() == 0 and (row == 1).all(), "a view keeps the memory"
    del row
    assert buffers.idle_bytes() >= 2 * MB
    c = buffers.empty((1000, 1000), torch.bfloat16, CPU)  # a little less
    assert c.data_ptr() == first and buffers.idle_bytes() == 0
    d = buffers.empty((1024, 1024), torch.bfloat16, CPU)
    assert d.data_ptr() not in (first, b.data_ptr())


def test_autograd_keeps_what_it_saved():
    x = buffers.empty((1024, 512), torch.float32, CPU).fill_(3).requires_grad_()
    y = x.square()
    del x
    assert buffers.idle_bytes() == 0
    y.sum().backward()
    del y
    assert buffers.idle_bytes() >= 2 * MB


def test_small_tensors_and_other_devices_are_torchs():
    assert buffers.empty((3, 0), torch.float64, CPU).shape == (3, 0)
    assert buffers.empty((), torch.float64, CPU).shape == ()
    small = buffers.empty((10,), torch.float32, CPU)
    del small
    assert buffers.empty((2**22,), torch.float32, torch.device("meta")).is_meta
    assert buffers.idle_bytes() == 0


def test_what_is_kept_does_not_grow():
    """A miss gives back as much idle memory as it takes, and a block twice too large is not taken."""
    big = buffers.empty((64 * MB,), torch.uint8, CPU)
    del big
    kept = buffers.idle_bytes()
    small = buffers.empty((2 * MB,), torch.uint8, CPU)
    assert buffers.idle_bytes() == 0
    del small
    assert 2 * MB <= buffers.idle_bytes() < 3 * MB < kept
    for size in range(4, 40):
        t = buffers.empty((size * MB,), torch.uint8, CPU)
        del t
    assert buffers.idle_bytes() < 80 * MB


def test_a_release_gives_everything_back():
    t = buffers.empty((2 * MB,), torch.uint8, CPU)
    del t
    buffers.release()
    assert buffers.idle_bytes() == 0


def test_the_size_is_counted_in_bytes_of_any_dtype():
    for dtype in (torch.float64, torch.float16, torch.int64, torch.bool):
        t = buffers.empty((MB, 2), dtype, CPU)
        assert (
            t.dtype == dtype
            and t.shape == (MB, 2)
            and t.untyped_storage().nbytes() == 2 * MB * dtype.itemsize
        )
