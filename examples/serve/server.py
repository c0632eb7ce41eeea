# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""A server with OpenAI's protocol on loopback, from its start to the end of its last process."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from transformers import AutoConfig

from modeling_coe.command_line import InputError, loading


# What starts an engine; the model, the port and the user's options come behind. `transformers serve` knows the model
# once this package is imported, vLLM by its plugin. `vllm serve` is the same server as vLLM's module here; in vLLM's
# build for CPUs that command does not start, since it asks for the release of a package `vllm`.
TRANSFORMERS = ("-c", "import modeling_coe; from transformers.cli.transformers import main; main()", "serve")
ENGINES = {
    "vllm": ("-m", "vllm.entrypoints.openai.api_server", "--model"),
    "transformers": TRANSFORMERS,
    "transformers-cb": (*TRANSFORMERS, "--continuous-batching"),
}
# What has to be installed for it.
NEEDS = {"vllm": ("vllm",), "transformers": ("fastapi", "uvicorn", "openai")}
PATIENCE = 15  # seconds that it may take to end
LOG_LINES = 100  # of a server that failed: in vLLM, a process of its own writes the cause before others give up


class Server(NamedTuple):
    """A server that answers.

    Args:
        url (`str`): Of its root; OpenAI's protocol is below `/v1`.
        pid (`int`): Of its first process, the ancestor of all others.
    """

    url: str
    pid: int


def family(engine: str) -> str:
    """The package that an engine is part of."""
    return engine.partition("-")[0]


def check_installed(package: str, user: str) -> None:
    """Raises [`InputError`] where a package that somebody uses is not installed."""
    if find_spec(package) is None:
        raise InputError(f"{user} needs {package}, which is not installed. Install it by `pip install {package}`.")


def check_engine(engine: str, given_by: str = "--engine") -> None:
    """Raises [`InputError`] where what an engine needs is not installed."""
    for package in NEEDS[family(engine)]:
        check_installed(package, f"{given_by} {engine}")


def check_model(model: str) -> None:
    """Raises [`InputError`] where a model's configuration cannot be loaded."""
    with loading(f"--model {model}", "Give a folder or the Hub name of a causal language model with its tokenizer."):
        AutoConfig.from_pretrained(model)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def engine_command(engine: str, model: str, port: int, options: str = "") -> list[str]:
    """The command line that serves a model.

    Args:
        engine (`str`): One of `ENGINES`.
        model (`str`): A folder or a Hub name, under which requests name it too.
        port (`int`): On loopback.
        options (`str`): More of the engine's own, as one would write them in a shell.
    """
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, *ENGINES[engine], model, *address, *shlex.split(options)]


@contextmanager
def serving(engine: str, model: str, options: str = "", timeout: float = 600) -> Iterator[Server]:
    """A server of a model. For the arguments see [`engine_command`] and [`running`]."""
    port = free_port()
    with running(engine_command(engine, model, port, options), f"http://127.0.0.1:{port}", timeout) as server:
        yield server


@contextmanager
def running(command: Sequence[str], url: str, timeout: float = 600) -> Iterator[Server]:
    """Starts a server, waits until `/health` answers, and stops all its processes in the end, also where this process
    is terminated. To be entered in the main thread.

    Args:
        command (`Sequence[str]`): Starts it, in a process group of its own.
        url (`str`): Of its root.
        timeout (`float`): Seconds that it may take to start.

    Raises:
        InputError: It ended or was not healthy in time; the message has the end of its log.
    """
    # On a CPU vLLM binds its threads to cores of its own choice, and its cache is nine tenths of the memory. Here they
    # stay on the cores of this process, with a cache of 2 GiB.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
    with terminating(), tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            wait_until_healthy(process, url, timeout, log)
            yield Server(url, process.pid)
        finally:
            stop(process)


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM ends this process as an exception does, so that what is started is stopped."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_healthy(url: str) -> bool:
    """Whether `/health` answers with 200."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=5)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):  # it does not listen yet
            return False


def wait_until_healthy(process: subprocess.Popen, url: str, timeout: float, log: Path) -> None:
    """Returns when `/health` answers with 200.

    Raises:
        InputError: The process has ended, or `timeout` seconds have passed.
    """
    end = time.monotonic() + timeout
    why = f"was not healthy after {timeout:g} seconds"
    while time.monotonic() < end:
        if (status := process.poll()) is not None:
            why = f"ended with exit status {status} before it was healthy"
            break
        if is_healthy(url):
            return
        time.sleep(0.2)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    raise InputError(f"The server {why}: {shlex.join(process.args)}\nThe end of its log:\n{tail}")


def stop(process: subprocess.Popen) -> None:
    """Asks a server to end, and kills what is left of its process group."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
