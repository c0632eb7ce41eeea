# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Makes the runs of a scale that are not finished yet, several at a time, each in a process of its own.

    python -m benchmarks.paper.run --scale cpu --dry-run             # what there is to do, and how long it takes
    python -m benchmarks.paper.run --scale cpu                       # do it; may be stopped and started at any time
    python -m benchmarks.paper.run --scale cpu --only figure_7 --seeds 1 2 3

Every finished run is a line of `results/<scale>/runs.jsonl`, which the run itself appends: none is lost when the
runner dies, and none is made again. Learning rates are chosen from the lines of their grid.
"""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.paper import results
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.runs import SCALES, Run, plan
from modeling_coe.command_line import InputError, check_positive, check_range, command, parse, setting


ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class RunnerSettings:
    scale: str = setting(help="what to run at", choices=tuple(SCALES))
    only: list[str] = setting([], ", ".join(EXPERIMENTS), choices=tuple(EXPERIMENTS), metavar="EXPERIMENT")
    seeds: list[int] = setting([], "of every experiment; the table's if not given")
    dry_run: bool = setting(False, "print the runs and their estimated time")
    jobs: int | None = setting(None, "runs at a time; the scale's if not given")
    threads: int = setting(1, "of one run")
    nice: int = setting(10, "lowers the priority of the runs")
    minutes: float | None = setting(None, "start no run that would not end within this time")
    results: Path = setting(results.RESULTS, "folder of the JSON lines")
    data_root: str = setting(str(ROOT.parent / "shared" / "data"), "folder of the data")


def parse_settings(argv: list[str] | None = None) -> RunnerSettings:
    """Reads the command line.

    Raises:
        InputError: An option has no such value.
    """
    settings = parse(RunnerSettings, __doc__.splitlines()[0], argv)
    check_positive(settings, "threads")
    if settings.jobs is not None:
        check_positive(settings, "jobs")
    if settings.minutes is not None:
        check_range(settings, "minutes", 0)
    if wrong := [seed for seed in settings.seeds if seed < 0]:
        raise InputError(f"--seeds has {wrong[0]}; they must be 0 or more.")
    if settings.results.exists() and not settings.results.is_dir():
        raise InputError(f"--results {settings.results} is a file; choose a folder.")
    return settings


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

    def __init__(self, settings: RunnerSettings, lock: int):
        self.settings, self.lock = settings, lock
        self.alive: set[subprocess.Popen] = set()
        self.guard, self.is_stopping = threading.Lock(), False

    def execute(self, run: Run) -> str | None:
        """Makes a run. Returns the end of its output if it failed."""
        options = {
            "scale": run.scale.name,
            "run": run.to_json(),
            "results": self.settings.results,
            "data-root": self.settings.data_root,
            "threads": self.settings.threads,
            "nice": self.settings.nice,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.settings.threads),
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),  # several runs at once share the cores
            "TOKENIZERS_PARALLELISM": "false",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # a run that is computed again on a GPU has the same bits
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
                    reason = missing_data(run, processes.settings.data_root)
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


def make_runs(settings: RunnerSettings, lock: int) -> set[str]:
    """Makes what is not finished, and plans again whenever a grid of learning rates is.

    Returns:
        The ids of the runs that are still missing; more may depend on them.
    """
    scale, path = SCALES[settings.scale], results.path_of(settings.scale, settings.results)
    deadline = float("inf") if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    processes, tried = Processes(settings, lock), set()
    while True:
        finished = results.load(path)
        stages, complete = plan(scale, finished, settings.only, settings.seeds)
        runs = [run for stage in stages.values() for run in stage]
        missing = {run.id for run in runs if run.id not in finished}
        todo = [run for run in runs if run.id in missing - tried]
        if not todo:
            return missing
        print(f"{len(runs) - len(missing)} runs are finished, {len(todo)} to go{'' if complete else ' at first'}.")
        execute_all(todo, processes, Estimates(finished, runs), settings.jobs or scale.jobs, deadline)
        tried |= missing


@command
def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(argv)
    scale, path = SCALES[settings.scale], results.path_of(settings.scale, settings.results)
    if settings.dry_run:
        finished = results.load(path)
        middle = scale.learning_rates[len(scale.learning_rates) // 2]
        stages, _ = plan(scale, finished, settings.only, settings.seeds, assumed_rate=middle)
        estimates = Estimates(finished, [run for stage in stages.values() for run in stage])
        print_plan(stages, finished, estimates, settings.jobs or scale.jobs)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with only_runner(path.parent) as lock:
        missing = make_runs(settings, lock)
    if missing:
        sys.exit(f"{len(missing)} runs are missing; the same command makes them.")


if __name__ == "__main__":
    main()
