# Copyright 2026 The CoE Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How torch's OpenMP threads wait for each other. To be imported before torch, whose library reads it when it loads.

A thread that has done its part of a loop spins until the others have done theirs. Where another process has one of
the cores, that is until its turn is over, thousands of times a step. Here it spins for some microseconds and then
sleeps. On a machine that does nothing else this costs a little, see `benchmarks/README.md`.
"""

import os


os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # of GNU's library, which torch's builds for Linux bring along
