# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""The paper's experiments (Chain-of-Experts, arXiv 2506.18945), re-run with seeds and with both baselines.

    python -m benchmarks.paper.run --scale cpu      # what is not finished yet
    python -m benchmarks.paper.report               # RESULTS.md and its plots

`experiments.py` is the table of what is compared, `runs.py` the scales and the runs this takes, `variants.py` the
models that the package does not have. `run.py` makes the runs, each in a process of `worker.py`, and `results.py`
keeps their JSON lines. `analysis.py` says what follows from them, `report.py` and `plots.py` show it.
"""
