# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Times a training step beside other work, under several settings of how torch's threads wait for each other.

    python -m benchmarks.wait_policy
    python -m benchmarks.wait_policy --threads 2 --busy 1 --rounds 5

torch computes with OpenMP. At the end of each of its loops a thread waits for the others, and by default it spins: it
keeps its core busy. Where another process has one of the cores, all threads spin until that one's turn is over, and
do so some thousand times a step. The setting is read once, when the library is loaded, so every measurement is a
process of its own. Settings take turns, and a figure is the median of their rounds, in wall time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=100": {"GOMP_SPINCOUNT": "100"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# The shape of `make demo`, a batch of it, and steps of one process.
SHAPE = {
    **{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024},
    **{"q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
    **{"moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2},
}
BATCH, LENGTH, STEPS = 32, 128, 12


def step_seconds(threads: int) -> float:
    """Median seconds of a training step in this process."""
    import torch

    from modeling_coe import CoeConfig, CoeForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = CoeForCausalLM(CoeConfig(**SHAPE)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    input_ids = torch.randint(3, SHAPE["vocab_size"], (BATCH, LENGTH))
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[STEPS // 3 :])


def measure(threads: int, setting: dict[str, str]) -> float:
    """[`step_seconds`] of a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).resolve().parents[1])} | setting
    command = [sys.executable, "-m", "benchmarks.wait_policy", "--step-of", str(threads)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Keeps that many cores busy."""
    with ExitStack() as stack:
        for _ in range(number):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch, beside a step of one thread")
    parser.add_argument("--busy", type=int, default=1, help="processes that keep a core each busy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step_of:
        print(json.dumps(step_seconds(args.step_of)))
        return {}

    from tqdm import tqdm

    cases = [(1, "default", 0)]
    cases += [(args.threads, setting, busy) for setting in SETTINGS for busy in (0, args.busy)]
    seconds = {case: [] for case in cases}
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for threads, setting, busy in cases:
            with busy_processes(busy):
                seconds[threads, setting, busy].append(measure(threads, SETTINGS[setting]))
    one = statistics.median(seconds[cases[0]])
    print(f"\n{'threads':>7}  {'setting':24}{'beside':>8}{'s/step':>9}{'range':>17}{'over one thread':>18}")
    for (threads, setting, busy), samples in seconds.items():
        median, span = statistics.median(samples), f"{min(samples):.3f} - {max(samples):.3f}"
        print(f"{threads:>7}  {setting:24}{busy:>8}{median:>9.3f}{span:>17}{median / one:>18.2f}")
    return {" ".join(map(str, case)): samples for case, samples in seconds.items()}


if __name__ == "__main__":
    main()
