"""Two processes on loopback (torchrun, gloo): tensor, expert and sharded data parallel equal a single process."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from .helpers import EXPERTS_BACKENDS, tiny_model, torchrun


def run_layout(folder: Path, layout: str, backends: tuple[str, ...]) -> subprocess.CompletedProcess:
    paths = ("--model", folder / "model", "--save", folder / "saved")
    return torchrun("tests.distributed_worker", *paths, "--layout", layout, "--backends", *backends)


@pytest.mark.parametrize("layout", ["tensor parallel", "expert parallel", "sharded data and expert parallel"])
def test_equals_one_process(tmp_path, layout):
    # Equal lengths, so that the mean of two half batches is the mean of the batch; large aux loss, so that it counts.
    # The vocabulary is split over the ranks.
    model = tiny_model(aux_loss_alpha=0.5, inner_iter=2, first_k_dense_replace=1, num_hidden_layers=3, vocab_size=100)
    model.save_pretrained(tmp_path / "model")
    run = run_layout(tmp_path, layout, EXPERTS_BACKENDS)
    if "requires `ep_size=tp_size`" in run.stderr:
        pytest.skip("before 5.20, transformers has expert parallel beside tensor parallel only")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))
    assert report == {"layout": layout, "backends": list(EXPERTS_BACKENDS)}


def test_experts_that_do_not_divide_are_refused(tmp_path):
    tiny_model(n_routed_experts=7, vocab_size=100).save_pretrained(tmp_path / "model")
    run = run_layout(tmp_path, "expert parallel", ("grouped_mm",))
    assert run.returncode != 0
    assert re.search(r"ValueError: .*(\b7\b.*\b2\b|divisible)", run.stderr), run.stderr
