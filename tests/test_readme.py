"""The pages for users: commands that the scripts understand, links that lead somewhere, Python that compiles."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import conversion.cli
import modeling_coe.diagnostics.cli
import modeling_coe.planning

from .helpers import ROOT


OTHERS = {"pip", "hf", "lm-eval", "python", "vllm", "curl", "transformers"}  # programs
VARIABLES = {"GOMP_SPINCOUNT=1000", "MALLOC_MMAP_MAX_=0", "MALLOC_TRIM_THRESHOLD_=17179869184"}  # before a program
PAGES = ("README.md", "examples/README.md", "examples/SCALING.md", "benchmarks/README.md", "CONTRIBUTING.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Commands of a page, word by word, without comments."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    text = re.sub(r'"\n.*?\n"', "PROGRAM", text, flags=re.DOTALL)
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def test_readme_is_for_a_newcomer():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page, words", COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS])
def test_commands_are_understood(page, words):
    """Every option of ours exists and has such a value; targets of make and modules exist."""
    words = [words[0].removeprefix(".venv-vllm/bin/"), *words[1:]]
    if words[:1] == ["make"]:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^[\w\- ]*\b{words[1]}\b[\w\- ]*:", makefile, re.MULTILINE)
    elif words[0] == "python" and words[1].startswith("examples/"):
        module = ".".join(Path(words[1]).with_suffix("").parts[1:])
        importlib.import_module(module).parse_settings(words[2:])
    elif words[0] == "coe-plan":
        modeling_coe.planning.parse_settings(words[1:])
    elif words[0] == "torchrun" or words[:2] == ["accelerate", "launch"]:
        script = next(i for i, word in enumerate(words) if re.match(r"examples/\w+\.py", word))
        importlib.import_module(Path(words[script]).stem).parse_settings(words[script + 1 :])
    elif words[:2] == ["python", "-m"] and words[2].startswith("vllm."):
        pass  # in an environment of its own
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] == "coe-convert":
        conversion.cli._parser().parse_args(words[1:])
    elif words[0] == "coe-routing":
        modeling_coe.diagnostics.cli.parse_settings(words[1:])
    else:
        program = next(word for word in words if word not in VARIABLES)
        assert program in OTHERS, words


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page):
    for code in blocks(page, "python"):
        compile(code, page, "exec")
