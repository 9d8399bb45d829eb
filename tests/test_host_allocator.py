"""Memory that is used again: whose it is, and how much is kept."""

import gc

import pytest
import torch

from megatron import host_allocator

CPU, MB = torch.device("cpu"), 2**20


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    host_allocator.release_idle()
    yield
    host_allocator.release_idle()


def test_memory_is_used_again_and_by_one_tensor_at_a_time():
    a = host_allocator.empty_cached((1024, 1024), torch.bfloat16, CPU)
    assert (
        a.shape == (1024, 1024)
        and a.dtype == torch.bfloat16
        and a.is_contiguous()
        and a.data_ptr() % 64 == 0
    )
    b = host_allocator.empty_cached((512, 1024), torch.float32, CPU)
    a.fill_(1), b.fill_(2)
    assert (a == 1).all() and (b == 2).all() and host_allocator.idle_bytes() == 0
    first = a.data_ptr()
    row = a[3:5]
    del a
    assert host_allocator.idle_bytes() == 0 and (row == 1).all(), "a view keeps the memory"
    del row
    assert host_allocator.idle_bytes() >= 2 * MB
    c = host_allocator.empty_cached((1000, 1000), torch.bfloat16, CPU)  # a little less
    assert c.data_ptr() == first and host_allocator.idle_bytes() == 0
    d = host_allocator.empty_cached((1024, 1024), torch.bfloat16, CPU)
    assert d.data_ptr() not in (first, b.data_ptr())


def test_autograd_keeps_what_it_saved():
    x = host_allocator.empty_cached((1024, 512), torch.float32, CPU).fill_(3).requires_grad_()
    y = x.square()
    del x
    assert host_allocator.idle_bytes() == 0
    y.sum().backward()
    del y
    assert host_allocator.idle_bytes() >= 2 * MB


def test_small_tensors_and_other_devices_are_torchs():
    assert host_allocator.empty_cached((3, 0), torch.float64, CPU).shape == (3, 0)
    assert host_allocator.empty_cached((), torch.float64, CPU).shape == ()
    small = host_allocator.empty_cached((10,), torch.float32, CPU)
    del small
    assert host_allocator.empty_cached((2**22,), torch.float32, torch.device("meta")).is_meta
    assert host_allocator.idle_bytes() == 0


def test_what_is_kept_does_not_grow():
    """A miss gives back as much idle memory as it takes, and a block twice too large is not taken."""
    big = host_allocator.empty_cached((64 * MB,), torch.uint8, CPU)
    del big
    kept = host_allocator.idle_bytes()
    small = host_allocator.empty_cached((2 * MB,), torch.uint8, CPU)
    assert host_allocator.idle_bytes() == 0
    del small
    assert 2 * MB <= host_allocator.idle_bytes() < 3 * MB < kept
    for size in range(4, 40):
        t = host_allocator.empty_cached((size * MB,), torch.uint8, CPU)
        del t
    assert host_allocator.idle_bytes() < 80 * MB


def test_a_release_gives_everything_back():
    t = host_allocator.empty_cached((2 * MB,), torch.uint8, CPU)
    del t
    host_allocator.release_idle()
    assert host_allocator.idle_bytes() == 0


def test_the_size_is_counted_in_bytes_of_any_dtype():
    for dtype in (torch.float64, torch.float16, torch.int64, torch.bool):
        t = host_allocator.empty_cached((MB, 2), dtype, CPU)
        assert (
            t.dtype == dtype
            and t.shape == (MB, 2)
            and t.untyped_storage().nbytes() == 2 * MB * dtype.itemsize
        )
