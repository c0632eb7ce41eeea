# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Memory of the weights' gradients on the CPU, which every training step takes and gives up again.

malloc gives blocks of this size back to the system at once, and the next step has them again as pages that are not
there: to touch these for the first time costs as much as to compute what goes in, and a virtual machine that has
returned them to its host in the meantime waits for the host as well. So blocks that nothing uses any more are kept
for the next tensor of their size. The system is told that it may have their pages back (`MADV_FREE`), which it takes
when memory is short; until then they count as resident.

It is for tensors whose sizes are the model's. Those that go with the batch come in ever other sizes, and blocks that
fit none of them would only be in the way.
"""

import ctypes
import mmap
import weakref

import torch


LARGE_BYTES = 2**25  # what is smaller comes from memory that malloc keeps
_HUGE_PAGE = 2**21

_free_blocks: dict[int, list[mmap.mmap]] = {}  # by their bytes


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised, contiguous CPU tensor: a large one in memory that is used again, in pages of 2 MiB where the
    system has them.

    Args:
        shape (`int`): Of the tensor.
        dtype (`torch.dtype`): Of the tensor.
    """
    num_elements = torch.Size(shape).numel()
    num_bytes = num_elements * dtype.itemsize
    block = _take(num_bytes + _HUGE_PAGE) if num_bytes >= LARGE_BYTES else None
    if block is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    # The storage holds this object, which holds the block, and both die with the last tensor of the storage.
    memory = (ctypes.c_char * len(block)).from_buffer(block)
    weakref.finalize(memory, _give_up, block).atexit = False
    offset = -ctypes.addressof(memory) % _HUGE_PAGE
    return torch.frombuffer(memory, dtype=dtype, count=num_elements, offset=offset).view(shape)


def _take(size: int) -> mmap.mmap | None:
    """A block that nothing uses, or a new one; `None` where the system has none of the kind."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    if blocks := _free_blocks.get(size):
        try:
            return blocks.pop()
        except IndexError:  # another thread was faster
            pass
    # What is free is not what is needed, as with another model than before.
    _free_blocks.clear()
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return None
    return block


def _give_up(block: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_FREE"):
        block.madvise(mmap.MADV_FREE)
        _free_blocks.setdefault(len(block), []).append(block)
