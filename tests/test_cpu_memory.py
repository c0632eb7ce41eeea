"""`modeling_coe/cpu_memory.py`: large tensors in memory that is used again once nothing else uses it."""

import gc
import mmap
import threading

import pytest
import torch

from modeling_coe import cpu_memory


SHAPE = (5, 2**12, 2**10)
needs_huge_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")


@pytest.fixture(autouse=True)
def no_free_blocks():
    cpu_memory._free_blocks.clear()
    yield
    cpu_memory._free_blocks.clear()


@needs_huge_pages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_tensors(dtype):
    tensor = cpu_memory.empty(*SHAPE, dtype=dtype)
    assert tensor.shape == SHAPE and tensor.dtype == dtype and tensor.is_contiguous()
    assert tensor.data_ptr() % 2**21 == 0
    tensor.fill_(2)
    last = tensor[-1]
    del tensor
    gc.collect()
    assert (last == 2).all()


@needs_huge_pages
@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="what nothing uses cannot be offered to the system here")
def test_memory_is_used_again_once_nothing_uses_it():
    first = cpu_memory.empty(*SHAPE, dtype=torch.float32).fill_(1)
    address, view = first.data_ptr(), first[1:, 3]
    second = cpu_memory.empty(*SHAPE, dtype=torch.float32).fill_(2)
    del first
    third = cpu_memory.empty(*SHAPE, dtype=torch.float32).fill_(3)
    assert len({address, second.data_ptr(), third.data_ptr()}) == 3  # a view of the first is alive
    assert (view == 1).all() and (second == 2).all()
    del view
    # Of another dtype and shape, and as many bytes.
    fourth = cpu_memory.empty(2 * SHAPE[0], *SHAPE[1:], dtype=torch.bfloat16).fill_(4)
    assert fourth.data_ptr() == address
    assert (second == 2).all() and (third == 3).all() and (fourth == 4).all()


@needs_huge_pages
def test_what_is_free_and_not_needed_goes_back():
    """As when another model is trained in the same process."""
    tensors = [cpu_memory.empty(*SHAPE, dtype=torch.float32) for _ in range(2)]
    tensors.clear()
    kept = cpu_memory.empty(3, *SHAPE, dtype=torch.float32)
    assert not any(cpu_memory._free_blocks.values())
    del kept


@needs_huge_pages
def test_threads_have_memory_of_their_own():
    failures = []

    def work(value: int) -> None:
        for _ in range(20):
            tensor = cpu_memory.empty(2**23 + 1, dtype=torch.float32).fill_(value)
            if not bool((tensor == value).all()):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_small_tensors_are_torchs(monkeypatch):
    monkeypatch.setattr(mmap, "mmap", None)
    for shape, dtype in (((0, 4, 5), torch.float32), ((3, 4, 5), torch.float16)):
        tensor = cpu_memory.empty(*shape, dtype=dtype)
        assert tensor.shape == shape and tensor.dtype == dtype


@pytest.mark.parametrize("missing", ["constant", "support", "giving up"])
def test_systems_without(monkeypatch, missing):
    class Memory(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    if missing == "support":
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
        monkeypatch.setattr(mmap, "mmap", Memory)
    else:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE" if missing == "constant" else "MADV_FREE", raising=False)
    for _ in range(2):
        tensor = cpu_memory.empty(3, 2**11, 2**11, dtype=torch.float32).fill_(1)
        assert tensor.shape == (3, 2**11, 2**11) and tensor[-1, -1, -1] == 1
        del tensor
        assert not any(cpu_memory._free_blocks.values())
