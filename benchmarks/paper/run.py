# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Makes the runs of a scale that are not finished yet, several at a time, each in a process of its own.

    python -m benchmarks.paper.run --scale cpu --dry-run             # what there is to do, and how long it takes
    python -m benchmarks.paper.run --scale cpu                       # do it; may be stopped and started at any time
    python -m benchmarks.paper.run --scale cpu --only figure_7 --seeds 1 2 3

Every finished run is a line of `results/<scale>/runs.jsonl`, which the run itself appends: none is lost when the
runner dies, and none is made again. Learning rates are chosen from the lines of their grid.
"""

import argparse
import fcntl
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.paper import results
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.runs import SCALES, Run, plan


ROOT = Path(__file__).resolve().parents[2]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", help="of every experiment; the table's if not given")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their estimated time")
    parser.add_argument("--jobs", type=int, help="runs at a time; the scale's if not given")
    parser.add_argument("--threads", type=int, default=1, help="of one run")
    parser.add_argument("--nice", type=int, default=10, help="lowers the priority of the runs")
    parser.add_argument("--minutes", type=float, help="start no run that would not end within this time")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="folder of the JSON lines")
    parser.add_argument("--data-root", default=str(ROOT.parent / "shared" / "data"), help="folder of the data")
    args = parser.parse_args(argv)
    for name, least in (("jobs", 1), ("threads", 1), ("minutes", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            parser.error(f"--{name} is {value}; it must be {least} or more")
    if wrong := [seed for seed in args.seeds or () if seed < 0]:
        parser.error(f"--seeds has {wrong[0]}; they must be 0 or more")
    if args.results.exists() and not args.results.is_dir():
        parser.error(f"--results {args.results} is a file; choose a folder")
    return args


# ---- Time -----------------------------------------------------------------------------------------------------------


class Estimates:
    """Seconds that runs will take, from those of finished ones."""

    def __init__(self, finished: Mapping[str, Any], planned: list[Run]):
        self.by_work: dict[str, list[float]] = {}
        factors = []
        for run in planned:
            if run.id in finished:
                self.by_work.setdefault(work_of(run), []).append(finished[run.id]["seconds"])
                factors.append(finished[run.id]["seconds"] / run.estimated_seconds)
        self.factor = statistics.median(factors) if factors else 1.0

    def __getitem__(self, run: Run) -> float:
        known = self.by_work.get(work_of(run))
        return statistics.median(known) if known else self.factor * run.estimated_seconds


def work_of(run: Run) -> str:
    """Equal for runs that take equally long."""
    return str({name: value for name, value in run.settings.items() if name not in ("seed", "lr")})


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{seconds / 60:.1f} min"


def print_plan(stages: Mapping[str, list[Run]], finished: Mapping[str, Any], estimates: Estimates, jobs: int) -> None:
    """A line for every run, with its time, and what an experiment and all of them still take."""
    remaining = 0.0
    for name, stage in stages.items():
        todo = sum(estimates[run] for run in stage if run.id not in finished)
        remaining += todo
        title = EXPERIMENTS[name].title if name in EXPERIMENTS else ""
        print(f"\n{name}: {title}" if title else f"\n{name}")
        for run in stage:
            state = "finished" if run.id in finished else duration(estimates[run])
            print(f"  {run.id}  {state:>9}  {run.label}")
        print(f"  {len(stage)} runs, {duration(todo)} to go")
    total = sum(map(len, stages.values()))
    missing = sum(run.id not in finished for stage in stages.values() for run in stage)
    print(f"\n{missing} of {total} runs to go: {duration(remaining / jobs)} with {jobs} at a time")


# ---- Running --------------------------------------------------------------------------------------------------------


@contextmanager
def only_runner(folder: Path) -> Iterator[int]:
    """Waits until no other runner, nor a run that one left behind, works on a folder.

    Yields:
        The lock's file descriptor. Processes that inherit it hold the lock too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another runner, or what it left behind, to finish with {folder}.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


class Processes:
    """Runs, each in a process that ends with the runner if the runner can help it."""

    module = "benchmarks.paper.worker"

    def __init__(self, args: argparse.Namespace, lock: int):
        self.args, self.lock = args, lock
        self.alive: set[subprocess.Popen] = set()
        self.guard, self.is_stopping = threading.Lock(), False

    def execute(self, run: Run) -> str | None:
        """Makes a run. Returns the end of its output if it failed."""
        options = {
            "scale": run.scale.name,
            "run": run.to_json(),
            "results": self.args.results,
            "data-root": self.args.data_root,
            "threads": self.args.threads,
            "nice": self.args.nice,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.args.threads),
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),  # several runs at once share the cores
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": path,
        }
        with self.guard:
            if self.is_stopping:
                return "stopped"
            process = subprocess.Popen(
                [sys.executable, "-m", self.module, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=[self.lock],
            )
            self.alive.add(process)
        output, _ = process.communicate()
        with self.guard:
            self.alive.discard(process)
        return output[-2000:] or "no output" if process.returncode else None

    def stop(self) -> None:
        with self.guard:
            self.is_stopping = True
            for process in self.alive:
                process.terminate()


def missing_data(run: Run, data_root: str) -> str | None:
    """A file of the run's data that is not there."""
    data = run.scale.data[run.arm.data]
    files = [file.replace("{root}", data_root) for file in (data.data, data.eval_data) if file and "{root}" in file]
    return next((file for file in files if not Path(file).exists()), None)


def execute_all(runs: list[Run], processes: Processes, estimates: Estimates, jobs: int, deadline: float) -> None:
    """Makes runs in their order, several at a time, under a progress bar. Prints why one was not made."""
    todo, working = list(runs), {}
    bar_format = "{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"  # runs weigh what they take
    with (
        tqdm(total=sum(estimates[run] for run in runs), bar_format=bar_format, smoothing=0) as bar,
        ThreadPoolExecutor(jobs) as pool,
    ):
        try:
            while todo or working:
                while todo and len(working) < jobs:
                    run = todo.pop(0)
                    reason = missing_data(run, processes.args.data_root)
                    if reason is None and time.monotonic() + estimates[run] > deadline:
                        reason = "the time is up"
                    if reason is None:
                        working[pool.submit(processes.execute, run)] = run
                    else:
                        bar.write(f"not begun: {run.label}: {reason}")
                bar.set_postfix_str(f"{len(todo)} waiting; " + "; ".join(run.label for run in working.values()))
                for future in wait(working, return_when=FIRST_COMPLETED).done:
                    run, error = working.pop(future), future.result()
                    bar.update(estimates[run])
                    if error is not None:
                        bar.write(f"failed: {run.label}\n{error}")
        except BaseException:
            processes.stop()
            raise


def make_runs(args: argparse.Namespace, lock: int) -> set[str]:
    """Makes what is not finished, and plans again whenever a grid of learning rates is.

    Returns:
        The ids of the runs that are still missing; more may depend on them.
    """
    scale, path = SCALES[args.scale], results.path_of(args.scale, args.results)
    deadline = float("inf") if args.minutes is None else time.monotonic() + 60 * args.minutes
    processes, tried = Processes(args, lock), set()
    while True:
        finished = results.load(path)
        stages, complete = plan(scale, finished, args.only, args.seeds)
        runs = [run for stage in stages.values() for run in stage]
        missing = {run.id for run in runs if run.id not in finished}
        todo = [run for run in runs if run.id in missing - tried]
        if not todo:
            return missing
        print(f"{len(runs) - len(missing)} runs are finished, {len(todo)} to go{'' if complete else ' at first'}.")
        execute_all(todo, processes, Estimates(finished, runs), args.jobs or scale.jobs, deadline)
        tried |= missing


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    scale, path = SCALES[args.scale], results.path_of(args.scale, args.results)
    if args.dry_run:
        finished = results.load(path)
        middle = scale.learning_rates[len(scale.learning_rates) // 2]
        stages, _ = plan(scale, finished, args.only, args.seeds, assumed_rate=middle)
        estimates = Estimates(finished, [run for stage in stages.values() for run in stage])
        print_plan(stages, finished, estimates, args.jobs or scale.jobs)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with only_runner(path.parent) as lock:
        missing = make_runs(args, lock)
    if missing:
        sys.exit(f"{len(missing)} runs are missing; the same command makes them.")


if __name__ == "__main__":
    main()
