"""The caching host allocator: ownership of memory, and how much of it is cached."""

import gc

import pytest
import torch

from megatron.host_allocator import empty_cached, idle_bytes, release_idle

CPU = torch.device("cpu")
MB = 2**20


@pytest.fixture(autouse=True)
def empty_cache():
    gc.collect()
    release_idle()
    yield
    release_idle()


def test_memory_is_reused_by_one_tensor():
    """Views keep the memory of their base."""
    a = empty_cached((1024, 1024), torch.bfloat16, CPU)
    assert a.shape == (1024, 1024)
    assert a.dtype == torch.bfloat16
    assert a.is_contiguous()
    assert a.data_ptr() % 64 == 0
    b = empty_cached((512, 1024), torch.float32, CPU)
    a.fill_(1)
    b.fill_(2)
    assert (a == 1).all() and (b == 2).all() and idle_bytes() == 0
    first = a.data_ptr()
    row = a[3:5]
    del a
    assert idle_bytes() == 0 and (row == 1).all()
    del row
    assert idle_bytes() >= 2 * MB
    c = empty_cached((1000, 1000), torch.bfloat16, CPU)  # slightly smaller
    assert c.data_ptr() == first and idle_bytes() == 0
    d = empty_cached((1024, 1024), torch.bfloat16, CPU)
    assert d.data_ptr() not in (first, b.data_ptr())


def test_memory_saved_by_autograd_stays():
    x = empty_cached((1024, 512), torch.float32, CPU).fill_(3).requires_grad_()
    y = x.square()
    del x
    assert idle_bytes() == 0
    y.sum().backward()
    del y
    assert idle_bytes() >= 2 * MB


def test_small_tensors_and_devices_use_torch():
    assert empty_cached((3, 0), torch.float64, CPU).shape == (3, 0)
    assert empty_cached((), torch.float64, CPU).shape == ()
    small = empty_cached((10,), torch.float32, CPU)
    del small
    assert empty_cached((2**22,), torch.float32, torch.device("meta")).is_meta
    assert idle_bytes() == 0


def test_cache_does_not_grow_without_bound():
    """A miss releases as much idle memory as it allocates; far larger blocks are not used."""
    big = empty_cached((64 * MB,), torch.uint8, CPU)
    del big
    after_big = idle_bytes()
    small = empty_cached((2 * MB,), torch.uint8, CPU)
    assert idle_bytes() == 0
    del small
    assert 2 * MB <= idle_bytes() < 3 * MB < after_big
    for size in range(4, 40):
        t = empty_cached((size * MB,), torch.uint8, CPU)
        del t
    assert idle_bytes() < 80 * MB


def test_release_idle_returns_everything():
    t = empty_cached((2 * MB,), torch.uint8, CPU)
    del t
    release_idle()
    assert idle_bytes() == 0


def test_size_is_in_bytes():
    for dtype in (torch.float64, torch.float16, torch.int64, torch.bool):
        t = empty_cached((MB, 2), dtype, CPU)
        assert t.dtype == dtype
        assert t.shape == (MB, 2)
        assert t.untyped_storage().nbytes() == 2 * MB * dtype.itemsize
