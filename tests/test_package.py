"""The wheel and the source distribution: what they hold, and that the wheel is all that is needed."""

import configparser
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.metadata import Metadata
from packaging.version import Version
from transformers import AutoModelForCausalLM

from .conversion_sources import make_source
from .helpers import ROOT, WITHOUT_PACKAGE, random_ids


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
# setuptools writes into the folder that it builds from, so that is a copy, of what a clone holds.
NOT_IN_A_CLONE = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs")

BUILD = """
import sys
from setuptools import build_meta

print(getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2]))
"""

# Imports the package, runs its commands and saves what they made.
INSTALLED = """
import modeling_coe

print("imported", flush=True)
print("imported", file=sys.stderr, flush=True)
import runpy
import torch
from transformers import AutoModelForCausalLM

site, folder = map(Path, sys.argv[1:])
chain, routing, saved = (str(folder / name) for name in ("chain", "routing", "saved"))

def run(command, *arguments):
    sys.argv = [command, *arguments]
    runpy.run_path(str(site / "bin" / command), run_name="__main__")

for command in (
    ("coe-convert", str(folder / "source"), chain, "--verify", "16"),
    ("coe-routing", chain, str(folder / "rows.txt"), "--out", routing, "--device", "cpu"),
):
    try:
        run(*command)
    except SystemExit as exit:
        assert not exit.code, (command, exit.code)
model = AutoModelForCausalLM.from_pretrained(chain)
model.save_pretrained(saved)
import modeling_coe.callbacks, modeling_coe.megablocks

# What the wheel lacks would be found elsewhere, where this project is installed in another way too.
ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES]
assert len(ours) > 20
elsewhere = [module.__name__ for module in ours if not Path(module.__file__).is_relative_to(site)]
assert not elsewhere, elsewhere
"""

# Computes what a saved folder computes by its own code.
STRANGER = """
import torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/saved", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    torch.save(model(torch.load(folder + "/input_ids.pt")).logits, folder + "/logits.pt")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(kind: str, source: Path, folder: Path) -> Path:
    name = run("-c", BUILD, kind, folder, cwd=source).stdout.splitlines()[-1]
    return folder / name


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory) -> Path:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    if importlib.util.find_spec("setuptools") is None or Version(importlib.metadata.version("setuptools")).major < 77:
        pytest.skip("setuptools 77 or newer is not installed")
    tree = tmp_path_factory.mktemp("tree") / "clone"
    return shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_IN_A_CLONE))


@pytest.fixture(scope="module")
def sdist(source_tree, tmp_path_factory) -> Path:
    return build("sdist", source_tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(source_tree, tmp_path_factory) -> Path:
    return build("wheel", source_tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel, and nothing else, is installed in."""
    folder = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-compile", "--target", folder)
    run("-m", "pip", "install", *options, wheel, cwd=folder)
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def package_files() -> set[str]:
    """What the packages hold: modules, the template of model cards, and the mark that they are typed."""
    folders = {package.replace(".", "/") for package in PACKAGES}
    modules = {
        path for folder in {name.partition("/")[0] for name in folders} for path in (ROOT / folder).rglob("*.py")
    }
    files = {path.relative_to(ROOT).as_posix() for path in modules}
    assert {name.rpartition("/")[0] for name in files} == folders, "pyproject.toml does not list every package"
    typed = {f"{package}/py.typed" for package in PACKAGES if "." not in package}
    return files | typed | {"model_cards/template.md"}


def test_the_wheel_holds_the_packages(wheel):
    files = contents(wheel)
    (info,) = {name.partition("/")[0] for name in files if ".dist-info/" in name}
    assert {name for name in files if not name.startswith(info)} == package_files()
    for name in package_files():
        assert files[name] == (ROOT / name).read_bytes()
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    commands = configparser.ConfigParser()
    commands.read_string(files[f"{info}/entry_points.txt"].decode())
    assert dict(commands["console_scripts"]) == PROJECT["project"]["scripts"]

    metadata = Metadata.from_email(files[f"{info}/METADATA"], validate=True)
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert metadata.license_expression == "Apache-2.0" and metadata.license_files == ["LICENSE"]


def test_the_source_distribution_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    assert files >= package_files() | {"LICENSE", "README.md", "pyproject.toml"}
    assert not any(name.startswith(("tests/", "examples/", "benchmarks/")) for name in files)
    (tmp_path / "wheel").mkdir()
    assert contents(build("wheel", tree, tmp_path / "wheel")) == contents(wheel)


def test_the_wheel_is_enough(site, tmp_path):
    """Elsewhere than in a clone: the import says nothing, the commands work, and what is saved loads without it."""
    pytest.importorskip("datasets")
    pytest.importorskip("matplotlib")
    source = AutoModelForCausalLM.from_pretrained(make_source(tmp_path / "source", "qwen3_moe"))
    (tmp_path / "rows.txt").write_text("Ann has 7 pens.\nTom has 3.\n")
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "MPLBACKEND": "agg"}
    program = f"import sys\nfrom pathlib import Path\nPACKAGES = {PACKAGES}\n{INSTALLED}"
    done = run("-c", program, site, tmp_path, cwd=tmp_path, PYTHONPATH=str(site), **environment)
    printed = done.stdout.partition("imported\n")[0]
    assert not printed and "coe" not in done.stderr.partition("imported\n")[0], done.stdout + done.stderr
    assert json.loads((tmp_path / "chain" / "conversion_report.json").read_text())["verification"]["passed"]
    assert json.loads((tmp_path / "routing" / "routing.json").read_text())["tokens"] == 25
    assert (tmp_path / "routing" / "load.png").is_file() and (tmp_path / "saved" / "README.md").is_file()

    input_ids = random_ids(2, 9)
    torch.save(input_ids, tmp_path / "input_ids.pt")
    run("-c", WITHOUT_PACKAGE + STRANGER, tmp_path, cwd=tmp_path, **environment)
    with torch.no_grad():
        expected = source(input_ids).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-4, rtol=1e-4)
