# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""How torch's OpenMP threads wait for each other. To be imported before torch, whose library reads it when it loads.

A thread that has done its part of a loop spins until the others have done theirs. Where another process has one of
the cores, that is until its turn is over, thousands of times a step. Here it spins for some microseconds and then
sleeps. On a machine that does nothing else this costs a little, see `benchmarks/README.md`.
"""

import os


os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # of GNU's library, which torch's builds for Linux bring along
