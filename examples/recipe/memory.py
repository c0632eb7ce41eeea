# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Memory that is not needed any more."""

import ctypes
import gc
import sys


def return_freed_memory() -> None:
    """Gives back to the system what training has freed: glibc keeps it, in pieces that new weights may not fit."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
