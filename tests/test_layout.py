"""In which direction the packages import each other, and what a saved folder has to do without."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .helpers import ROOT


# Package -> those it may import. The others of the repository are built on all of them.
MAY_IMPORT = {
    "configuration_coe": set(),
    "model_cards": {"configuration_coe"},
    "modeling_coe": {"configuration_coe", "model_cards"},
    "conversion": {"configuration_coe", "model_cards", "modeling_coe"},
    "vllm_coe": {"configuration_coe", "modeling_coe"},
}
OURS = {*MAY_IMPORT, "benchmarks", "examples", "tests"}


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Level (the number of dots) and name of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    for file in (ROOT / package).rglob("*.py"):
        others = {name.partition(".")[0] for level, name in imports(file) if level == 0} & OURS - {package}
        assert others <= MAY_IMPORT[package], f"{file.relative_to(ROOT)} imports {others - MAY_IMPORT[package]}"


def test_a_folder_carries_flat_siblings():
    """What `modeling_coe.py` needs lies beside it, and needs none of the packages: a saved folder has copies alone."""
    folder, seen, left = ROOT / "modeling_coe", set(), ["modeling_coe"]
    while left:
        seen.add(name := left.pop())
        if name == "configuration_coe":  # in a folder it is the configuration itself
            continue
        for level, module in imports(folder / f"{name}.py"):
            assert level < 2 and "." not in module * level, f"{name}.py imports {module} from a sub-package"
            assert level == 1 or module.partition(".")[0] not in OURS, f"{name}.py imports {module}"
            if level == 1 and module not in seen:
                left.append(module)
    assert {"attention", "backbones", "balancing", "checkpoint", "experts", "staging"} < seen
    assert not {"callbacks", "diagnostics", "lora", "megablocks"} & seen
