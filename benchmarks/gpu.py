# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""All that is to be measured on a GPU, in steps of at most nine minutes, on a machine that may have no network.

    make gpu-wheels                                 # where there is a network: what such a machine lacks
    make gpu                                        # all steps that are not done yet
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu experts train          # these, done or not
    python -m benchmarks.gpu --dry-run              # every step on the CPU, tiny, to try the programs

A step runs its programs one after the other, each in a process of its own, until they are done or its time is up. What
they write is in `benchmarks/results/<device>/`, with a `step-NAME.json` that says how the step ended; a step that is
done is not run again, one that failed or ran out of time is, and what it had measured is there. Steps need no other
one, and any order will do.

This file imports nothing but Python's own library: it is what installs the rest, from the folder of wheels into one of
its own that goes before what the machine has.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parents[1]
WHEELS, SITE, LOGS = ROOT / "runs" / "wheels", ROOT / "runs" / "site-packages", ROOT / "runs" / "gpu-logs"
# What a machine with torch may lack, without torch's own packages. Versions are those of `constraints.txt`. Of what
# `datasets` needs, pandas and pyarrow are not among them: they are too large to carry.
PACKAGES = (
    *("transformers", "huggingface_hub", "tokenizers", "safetensors", "accelerate", "peft", "datasets", "torchao"),
    *("stanford-stk", "matplotlib", "tqdm", "pytest", "hypothesis", "setuptools"),
    # what these need
    *("PyYAML", "regex", "packaging", "filelock", "fsspec", "typing_extensions", "typer", "click", "shellingham"),
    *("rich", "annotated-doc", "markdown-it-py", "mdurl", "Pygments", "hf-xet", "httpx2", "httpcore2", "h11", "anyio"),
    *("idna", "truststore", "psutil", "dill", "xxhash", "multiprocess", "pluggy", "iniconfig", "sortedcontainers"),
    *("contourpy", "cycler", "fonttools", "kiwisolver", "pyparsing", "python-dateutil", "six"),
)
SOURCES = ("stanford-stk",)  # without a wheel: pure Python, which is built here
WHEELS_LIMIT = 64 * 2**20  # bytes that are easily carried

MINUTES = 9
ROWS = "8 16 32 64 128 256"


class Step(NamedTuple):
    """One thing to measure.

    Args:
        about (`str`): For the list of steps.
        commands (`tuple[str, ...]`): Modules with their options, after variables of the environment; `{size}` and such
            are filled in.
        needs (`tuple[str, ...]`): Modules without which it is left out.
        minutes (`float`): After which it is stopped.
    """

    about: str
    commands: tuple[str, ...]
    needs: tuple[str, ...] = ("transformers",)
    minutes: float = MINUTES


STEPS = {
    "kernels": Step(
        "whether MegaBlocks' kernels work here, and what they need of the device",
        (
            "modeling_coe.megablocks",
            "TRITON_INTERPRET=0 benchmarks.kernels --capabilities {capability} --dtypes {dtypes} --output {output}",
        ),
        ("transformers", "stk", "triton"),
        minutes=4,
    ),
    "tests": Step(
        "tests on the device: kernels, models, adapters, 8-bit weights",
        ("pytest -q -p no:cacheprovider -k cuda tests/test_devices.py tests/test_megablocks.py",),
        ("transformers", "pytest", "hypothesis", "peft", "stk", "triton"),
    ),
    "experts": Step(
        "experts of the paper's size, every implementation",
        ("benchmarks.experts --size {paper} --tokens {tokens} --experts {paper_experts} {only} {common}",),
    ),
    "published": Step(
        "experts of 32,768 tokens, hidden size 4,096, width 1,024, 128 experts, 8 for a token",
        ("benchmarks.experts --size {published} --tokens {tokens} --experts {experts} --pairs 3 {only} {common}",),
    ),
    "threshold": Step(
        "rows an expert from which blocks are faster",
        (
            "COE_MEGABLOCKS_MIN_ROWS_PER_EXPERT=0 benchmarks.experts --size {paper} --experts {paper_experts} "
            "--rows-per-expert {rows} --implementations grouped_mm batched_mm megablocks --label threshold --pairs 3 "
            "{common}",
        ),
        ("transformers", "stk", "triton"),
    ),
    "train": Step(
        "a training step at the paper's size, of half the paper's batch, which fits 80 GB beside its competitor",
        (
            "benchmarks.train_step --size {paper} {batch} --pairs 3 --tasks train_step forward_backward {only} "
            "{common}",
        ),
    ),
    "memory": Step(
        "peak memory of such a step",
        (
            "benchmarks.train_step --size {paper} {batch} --tasks peak_memory --label memory "
            "--implementations {trainable} {common}",
        ),
    ),
    "train-published": Step(
        "a training step of one layer of the published shape",
        ("benchmarks.train_step --size {published} --pairs 3 --tasks train_step forward_backward {only} {common}",),
    ),
    "generate": Step(
        "reading a prompt and decoding", ("benchmarks.generate --size {paper} --pairs 5 {only} {common}",)
    ),
    "compile": Step(
        "decoding in CUDA graphs over a static cache",
        (
            "benchmarks.generate --size {paper} --pairs 3 --tasks {compiled} --label compiled "
            "--implementations {compilable} {common}",
        ),
    ),
    "compile-train": Step(
        "compiled training",
        (
            "benchmarks.train_step --size {paper} {batch} --pairs 3 --tasks forward_backward_compiled "
            "--label compiled --implementations grouped_mm {common}",
        ),
    ),
    "adapters": Step(
        "training and decoding with low-rank adapters",
        ("benchmarks.adapters --size {paper} {batch} --pairs 3 {common}",),
        ("transformers", "peft"),
    ),
    "int8": Step(
        "decoding with 8-bit weights",
        (
            "benchmarks.generate --size {paper} --pairs 3 --int8 --label int8 --implementations grouped_mm eager "
            "--tasks prefill decode_b1 decode_b8 {common}",
        ),
        ("transformers", "torchao"),
    ),
    "headline": Step(
        "the paper's headline experiment, as far as the time goes; may be repeated",
        ("benchmarks.paper.run --scale {scale} --minutes {run_minutes} --results {output}/paper {run_options}",),
        ("transformers", "datasets", "pandas", "pyarrow"),
    ),
}


class Plan(NamedTuple):
    """What commands are filled in with, and where results go."""

    output: Path
    values: dict[str, str]
    environment: dict[str, str]


# ---- The machine ----------------------------------------------------------------------------------------------------


def slug(device: str) -> str:
    """A device's name as a folder: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def environment_of_steps() -> dict[str, str]:
    """This process's, with the packages from wheels and this project before those of the machine."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "examples"), str(SITE), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def ask(program: str, environment: dict[str, str]) -> str:
    """What a Python program prints in a process of its own, whose packages are those of the steps."""
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    return result.stdout.strip()


DEVICE = (
    "import torch; assert torch.cuda.is_available(); major, minor = torch.cuda.get_device_capability(); "
    "print(torch.cuda.get_device_name(), f'{major}.{minor}', sep='\\n')"
)
MISSING = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"


def missing_modules(modules: Iterable[str], environment: dict[str, str]) -> list[str]:
    program = [sys.executable, "-c", MISSING, *modules]
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout.split()


def distribution(name: str) -> str:
    """The name of a distribution, however it is spelt."""
    return re.sub(r"[-_.]+", "-", name).lower()


def version_key(version: str) -> list[int]:
    """To compare releases with; what follows the numbers does not count."""
    return [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]


def wheels_to_install(folder: Path, installed: Callable[[str], str | None]) -> list[Path]:
    """The wheels of packages that are not installed, or in an older release."""
    chosen = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        present = installed(name)
        if present is None or version_key(present) < version_key(version):
            chosen.append(wheel)
    return chosen


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_wheels(wheels: list[Path]) -> None:
    """Puts wheels into a folder of their own, unless just these are there."""
    record, names = SITE / "wheels.txt", "\n".join(wheel.name for wheel in wheels)
    if record.exists() and record.read_text() == names:
        return
    shutil.rmtree(SITE, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(SITE)]
    subprocess.run([*pip, *map(str, wheels)], check=True)
    record.write_text(names)


def download_wheels(python: str, folder: Path = WHEELS) -> int:
    """Fetches what a machine may lack, in the releases of `constraints.txt`, for Linux on x86-64.

    Returns:
        `int`: Bytes of all wheels.
    """
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {distribution(line.partition("==")[0]): line for line in lines}
    pinned = {name: pins[distribution(name)] for name in PACKAGES}
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", *(pinned.pop(name) for name in SOURCES)], check=True
    )
    target = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    target += [f"--platform=manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 26, 24, 17)]
    target += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    subprocess.run([*pip, "download", "--no-deps", f"--dest={folder}", *target, *pinned.values()], check=True)
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def describe(environment: dict[str, str]) -> dict[str, Any]:
    """What a reader needs to place the figures, and who repeats them."""
    smi = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm", "--format=csv"]
    report = subprocess.run([smi, *query], capture_output=True, text=True).stdout.strip() if smi else "no nvidia-smi"
    found = ask(
        "import importlib.metadata, json\n"
        "print(json.dumps([(d.name, d.version) for d in importlib.metadata.distributions() if d.name]))",
        environment,
    )
    names = {distribution(name) for name in ("torch", "triton", "numpy", *PACKAGES)}
    # The first of a name is the one that is imported.
    versions = {distribution(name): version for name, version in reversed(json.loads(found or "[]"))}
    return {
        "nvidia_smi": report,
        "python": sys.version.split()[0],
        "versions": {name: version for name, version in sorted(versions.items()) if name in names},
        "missing": missing_modules(sorted({module for step in STEPS.values() for module in step.needs}), environment),
        "wheels": sorted(wheel.name for wheel in SITE.glob("*.dist-info")),
    }


# ---- Running --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a step ended.

    Attributes:
        step (`str`): Its name.
        state (`str`): "done", "failed", "out of time" or "left out".
        date (`str`): Of the run.
        seconds (`float`): It took.
        reason (`str`, *optional*): Why it is not done.
        commands (`list[dict]`): What ran, its seconds and its exit code.
    """

    step: str
    state: str
    date: str
    seconds: float = 0.0
    reason: str | None = None
    commands: list[dict[str, Any]] | None = None


def run_command(command: str, plan: Plan, seconds: float, log: Path) -> int | None:
    """Runs `VARIABLE=VALUE ... MODULE OPTION ...`; its output goes to the end of a file.

    Returns:
        The exit code, or `None` where the time was up; all its processes are ended then.
    """
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z0-9_]+=.*", word))
    arguments = [word for word in words if not re.fullmatch(r"[A-Z0-9_]+=.*", word)]
    with log.open("a") as file:
        print(f"$ {command}", file=file, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=plan.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_step(name: str, plan: Plan, logs: Path) -> Outcome:
    """Runs a step and writes its file."""
    step, start = STEPS[name], time.monotonic()
    outcome = Outcome(name, "done", datetime.date.today().isoformat(), commands=[])
    log = logs / f"{name}.log"
    log.unlink(missing_ok=True)
    print(f"\n{name}: {step.about}", flush=True)
    if missing := missing_modules(step.needs, plan.environment):
        outcome.state, outcome.reason = "left out", f"not installed: {', '.join(missing)}"
    for command in () if missing else step.commands:
        command = command.format(**plan.values)
        begin = time.monotonic()
        code = run_command(command, plan, 60 * step.minutes - (begin - start), log)
        shown = command.replace(f"{plan.output}", "OUTPUT")
        outcome.commands.append({"command": shown, "seconds": time.monotonic() - begin, "code": code})
        if code is None:
            outcome.state, outcome.reason = "out of time", f"stopped after {step.minutes:g} minutes: {shown}"
            break
        if code:
            outcome.state, outcome.reason = "failed", f"exit code {code}: {shown}"
    outcome.seconds = time.monotonic() - start
    path = plan.output / f"step-{name}.json"
    path.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    tail = log.read_text(errors="replace").splitlines()[-30:] if log.exists() and outcome.state != "done" else []
    print("\n".join(tail), end="\n" if tail else "")
    print(f"{name}: {outcome.state}, {outcome.seconds:.0f} s" + (f", {outcome.reason}" if outcome.reason else ""))
    return outcome


def is_done(name: str, folder: Path) -> bool:
    path = folder / f"step-{name}.json"
    return path.exists() and json.loads(path.read_text())["state"] == "done"


def make_plan(settings: argparse.Namespace) -> Plan:
    """What to run on this machine.

    Raises:
        SystemExit: There is no CUDA device, and it is no dry run.
    """
    environment = environment_of_steps()
    if settings.dry_run:
        output = settings.output or ROOT / "runs" / "gpu-dry-run"
        values = {
            **{"paper": "tiny", "published": "tiny", "tokens": "64", "experts": "8", "paper_experts": "8"},
            **{"rows": "1", "capability": "9.0", "scale": "smoke", "run_minutes": "5"},
            **{"run_options": "--dry-run", "output": str(output)},
            **{"only": "--implementations grouped_mm", "compiled": "decode_b1_compiled", "compilable": "grouped_mm"},
            **{"dtypes": "bfloat16", "trainable": "grouped_mm", "batch": ""},
            "common": f"--device cpu --dtype float32 --quick --output {output}",
        }
        return Plan(output, values, environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    found = ask(DEVICE, environment).splitlines()
    if len(found) != 2:
        sys.exit("error: torch sees no CUDA device here. `--dry-run` tries every step on the CPU.")
    device, capability = found
    output = settings.output or ROOT / "benchmarks" / "results" / slug(device)
    values = {
        **{"paper": "paper", "published": "published", "tokens": "32768", "experts": "128", "paper_experts": "63"},
        **{"rows": ROWS, "capability": capability, "scale": "gpu-hour", "run_minutes": str(MINUTES - 1)},
        **{"run_options": "--jobs 4", "output": str(output)},
        **{"only": "", "compiled": "decode_b1_compiled decode_b8_compiled", "compilable": "grouped_mm batched_mm"},
        **{
            "dtypes": "bfloat16 float16 float32 tf32",
            "trainable": "grouped_mm megablocks",
            "batch": "--batch-size 32",
        },
        "common": f"--device cuda --output {output}",
    }
    return Plan(output, values, environment)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help="all that are not done yet if not given")
    parser.add_argument("--list", action="store_true", help="print the steps")
    parser.add_argument("--dry-run", action="store_true", help="every step on the CPU, tiny")
    parser.add_argument(
        "--wheels", metavar="PYTHON", help="only fetch wheels for this version of Python, such as 3.12"
    )
    parser.add_argument("--output", type=Path, help="folder of results")
    settings = parser.parse_args(argv)
    if wrong := [name for name in settings.steps if name not in STEPS]:
        parser.error(f"no step {wrong[0]!r}; there are {', '.join(STEPS)}")
    if settings.list:
        print("\n".join(f"{name:<16} {step.minutes:g} min  {step.about}" for name, step in STEPS.items()))
        return 0
    if settings.wheels:
        size = download_wheels(settings.wheels)
        print(f"{WHEELS.relative_to(ROOT)}: {size / 2**20:.1f} MiB")
        return 0 if size <= WHEELS_LIMIT else 1

    if not settings.dry_run and (wheels := wheels_to_install(WHEELS, installed_version)):
        install_wheels(wheels)
    plan = make_plan(settings)
    plan.output.mkdir(parents=True, exist_ok=True)
    logs = LOGS / plan.output.name
    logs.mkdir(parents=True, exist_ok=True)
    machine = describe(plan.environment)
    (plan.output / "environment.json").write_text(json.dumps(machine, indent=1) + "\n")
    print(json.dumps(machine, indent=1))
    names = settings.steps or [name for name in STEPS if not is_done(name, plan.output)]
    outcomes = [run_step(name, plan, logs) for name in names]
    print(f"\nto commit: {plan.output}")
    return 0 if all(outcome.state == "done" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
