"""The processes of a parallel run, with the environment that torchrun gives them, forked by a server that has imported
what takes longest and has done nothing else: torchrun and each process that it starts would import it anew."""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest import mock

import torch

from .helpers import ROOT


class Ranks(NamedTuple):
    """The exit code of each process, and what all of them printed."""

    exit_codes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """Zero when that of every process is."""
        return max(map(abs, self.exit_codes))


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["modeling_coe", "transformers.trainer"])


def run_module(name: str, *arguments: str) -> None:
    """As `python -m` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_script(path: str, *arguments: str) -> None:
    """As `python` does."""
    sys.argv, sys.path[:0] = [path, *arguments], [str(Path(path).parent)]
    runpy.run_path(path, run_name="__main__")


def _rank(environment: Mapping[str, str], folder: Path, program: Callable, arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    program(*arguments)


def run_ranks(
    program: Callable,
    *arguments: str | Path,
    processes: int = 2,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Ranks:
    """Runs a program in processes of one thread each, on loopback.

    Args:
        program: A function that a module has by this name, called with the arguments.
        environment: Variables beside those of this process.
        timeout: Seconds, after which the processes are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
    with TemporaryDirectory() as name:
        folder, started = Path(name), []
        for rank in range(processes):
            own = os.environ | shared | (environment or {}) | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(FORKS.Process(target=_rank, args=(own, folder, program, tuple(map(str, arguments)))))
            with mock.patch.dict(os.environ, shared):  # the first one starts the server: it imports this checkout
                started[-1].start()
        end = time.monotonic() + timeout
        for process in started:
            process.join(max(0, end - time.monotonic()))
        for process in started:
            process.kill()  # one that is still alive is out of time
            process.join()
        printed = [(folder / stream).read_text(encoding="utf-8") for stream in ("stdout", "stderr")]
    return Ranks([process.exitcode for process in started], *printed)
