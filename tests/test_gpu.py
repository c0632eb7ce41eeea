"""`benchmarks/gpu.py`: every step's programs run, tiny, and what is missing or slow stops no other step."""

import ast
import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, measure

from .helpers import ROOT
from .test_benchmarks import restored  # noqa: F401  programs set the number of threads


pytest.importorskip("stk", reason="stanford-stk is not installed")

# Step -> results that it writes in a dry run.
RESULTS = {
    "kernels": {"kernels.json", "kernels.md"},
    "tests": set(),
    "experts": {f"experts-tiny.{end}" for end in ("json", "md", "png")},
    "published": {f"experts-tiny.{end}" for end in ("json", "md", "png")},
    "threshold": {f"experts-tiny-threshold.{end}" for end in ("json", "md", "png")},
    "train": {f"train_step-tiny.{end}" for end in ("json", "md", "png")},
    "memory": {f"train_step-tiny-memory.{end}" for end in ("json", "md", "png")},
    "train-published": {f"train_step-tiny.{end}" for end in ("json", "md", "png")},
    "generate": {f"generate-tiny.{end}" for end in ("json", "md", "png")},
    "compile": {f"generate-tiny-compiled.{end}" for end in ("json", "md", "png")},
    "compile-train": {f"train_step-tiny-compiled.{end}" for end in ("json", "md", "png")},
    "adapters": {f"adapters-tiny.{end}" for end in ("json", "md", "png")},
    "int8": {f"generate-tiny-int8.{end}" for end in ("json", "md", "png")},
    "headline": set(),
}
# Steps that need processes of their own: with variables that are read by imports, or beside this run of pytest.
APART = {"kernels", "tests", "threshold", "headline"}


@pytest.fixture(autouse=True)
def logs(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")


def run_here(command: str, plan: gpu.Plan, seconds: float, log: Path) -> int:
    """Runs a step's command without a process of its own, which would import everything anew."""
    module, *options = shlex.split(command)
    importlib.import_module(module).main(options)
    return 0


def check_adapters(rows: list[dict], tasks: set[str]) -> None:
    """Every way of training has its figures, and full fine-tuning takes as long as itself."""
    module = importlib.import_module("benchmarks.adapters")
    for task in tasks:
        found = {row["model"]: row for row in rows if row["task"] == task}
        assert tuple(found) == module.MODELS and found[module.ALL]["ratio"]["median"] == 1
        for row in found.values():
            ratios = [one / all for one, all in zip(row["samples"], found[module.ALL]["samples"], strict=True)]
            assert row["ratio"] == measure.spread(ratios)._asdict() and min(row["samples"]) > 0


@pytest.mark.parametrize("name", gpu.STEPS)
def test_a_step(name, tmp_path, capsys, monkeypatch):
    output = tmp_path / "a-device"
    if name not in APART:
        monkeypatch.setattr(gpu, "run_command", run_here)
    code = gpu.main([name, "--dry-run", "--output", str(output)])
    outcome = json.loads((output / f"step-{name}.json").read_text())
    if outcome["state"] == "left out":
        assert code == 1 and outcome["reason"].startswith("not installed: ")
        pytest.skip(outcome["reason"])
    assert code == 0 and outcome["state"] == "done", capsys.readouterr().out
    assert [each["code"] for each in outcome["commands"]] == [0] * len(gpu.STEPS[name].commands)
    written = {path.name for path in output.iterdir()} - {"environment.json", f"step-{name}.json"}
    assert written == RESULTS[name]
    if name == "threshold":
        results = json.loads((output / "experts-tiny-threshold.json").read_text())
        implementations = {row["implementation"] for row in results["comparisons"]}
        assert implementations == {"grouped_mm", "batched_mm", "megablocks"}
        assert len(results["notes"]) == 2 and "rows per expert on." in results["notes"][0]
    if name == "adapters":
        results = json.loads((output / "adapters-tiny.json").read_text())
        check_adapters(results["rows"], set(results["settings"]["tasks"]) - results["skipped"].keys())
    for path in output.glob("*-tiny*.json"):
        results = json.loads(path.read_text())
        rows = results.get("comparisons") or results["rows"]
        tasks = results["settings"].get("tasks") or {row["task"] for row in rows}
        measured = {row["task"] for row in rows}
        if any(what.startswith("peak_memory") for what in results["skipped"]):  # not every system measures so little
            measured |= {task for task in tasks if task.startswith("peak_memory")}
        assert set(tasks) <= measured, results["skipped"]


@pytest.fixture
def steps(monkeypatch):
    """Steps of programs that take no time."""
    monkeypatch.setattr(
        gpu,
        "STEPS",
        {
            "good": gpu.Step("", ("VALUE=7 timeit -n 1 -r 1 pass",), ()),
            "bad": gpu.Step("", ("no_such_module_of_ours", "timeit -n 1 -r 1 pass"), ()),
            "slow": gpu.Step("", ('timeit -n 1 -r 1 "import time; time.sleep(60)"', "never"), (), minutes=0.02),
            "absent": gpu.Step("", ("never",), ("no_such_package",)),
        },
    )


@pytest.mark.usefixtures("steps")
class TestRunning:
    def run(self, folder: Path, *options: str) -> dict[str, dict]:
        assert gpu.main(["--dry-run", "--output", str(folder), *options]) in (0, 1)
        return {path.stem.removeprefix("step-"): json.loads(path.read_text()) for path in folder.glob("step-*")}

    def test_each_step_says_how_it_ended(self, tmp_path, capsys):
        outcomes = self.run(tmp_path)
        assert {name: each["state"] for name, each in outcomes.items()} == {
            "good": "done",
            "bad": "failed",
            "slow": "out of time",
            "absent": "left out",
        }
        assert [each["code"] for each in outcomes["bad"]["commands"]] == [1, 0]  # the next one runs all the same
        assert [each["code"] for each in outcomes["slow"]["commands"]] == [None] and outcomes["slow"]["seconds"] < 30
        assert outcomes["absent"]["reason"] == "not installed: no_such_package"
        output = capsys.readouterr().out
        assert "No module named no_such_module_of_ours" in output and f"to commit: {tmp_path}" in output

    def test_what_is_done_is_not_run_again(self, tmp_path):
        first, second = self.run(tmp_path), self.run(tmp_path)
        assert second["good"] == first["good"] and second["bad"] != first["bad"]
        assert self.run(tmp_path, "good")["good"] != first["good"]


def test_without_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ask", lambda program, environment: "")
    with pytest.raises(SystemExit, match="torch sees no CUDA device here"):
        gpu.make_plan(gpu.argparse.Namespace(dry_run=False, output=tmp_path))


def test_results_are_named_after_the_device(monkeypatch):
    monkeypatch.setattr(gpu, "ask", lambda program, environment: "NVIDIA H100 80GB HBM3\n9.0")
    plan = gpu.make_plan(gpu.argparse.Namespace(dry_run=False, output=None))
    assert plan.output == ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
    commands = [command.format(**plan.values) for step in gpu.STEPS.values() for command in step.commands]
    assert sum("--device cuda" in command for command in commands) >= 9
    assert any("benchmarks.kernels --capabilities 9.0" in command for command in commands)


def test_a_bare_machine_can_run_it():
    """Nothing but Python's own library is imported before the wheels are there, and no step lasts too long."""
    tree = ast.parse((ROOT / "benchmarks" / "gpu.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names
    assert all(step.minutes <= 9 for step in gpu.STEPS.values())


def test_wheels(tmp_path):
    """Those of packages that are missing or older are installed, whatever the spelling of their names."""
    for name in ("a_b-1.10.0", "newer-1.0", "same-2.0.1.post1", "missing-0.1"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    installed = {"a_b": "1.9.2", "newer": "1.0.1", "same": "2.0.1"}
    chosen = gpu.wheels_to_install(tmp_path, installed.get)
    assert [path.name.split("-")[0] for path in chosen] == ["a_b", "missing"]
    pins = {gpu.distribution(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {gpu.distribution(name) for name in gpu.PACKAGES} <= pins and set(gpu.SOURCES) < set(gpu.PACKAGES)
