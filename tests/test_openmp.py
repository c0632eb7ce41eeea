"""How torch's threads wait for each other is set where torch's OpenMP still reads it."""

import ast
import os
import subprocess
import sys

import pytest

from .helpers import ROOT


SCRIPTS = ("pretrain", "finetune_lora", "sft", "evaluation", "routing")


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_set_it_before_they_import_torch(script):
    """Before anything, in fact, but the standard library."""
    tree = ast.parse((ROOT / "examples" / f"{script}.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    assert next(name for name in names if name.partition(".")[0] not in sys.stdlib_module_names) == "recipe.openmp"


@pytest.mark.parametrize("given", [None, "77"])
def test_it_reaches_the_library(given):
    """The library itself prints what it has read. What a user has set stays."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"}
    if given:
        environment["GOMP_SPINCOUNT"] = given
    run = subprocess.run(
        [sys.executable, "-c", "import routing"], env=environment, capture_output=True, text=True, check=True
    )
    if "GOMP_SPINCOUNT" not in run.stderr:
        pytest.skip("torch is built with another OpenMP library than GNU's")
    assert f"GOMP_SPINCOUNT = '{given or 1000}'" in run.stderr
