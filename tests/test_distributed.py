"""Two processes on loopback (gloo) equal one: tensor, expert and sharded data parallel, FSDP and ZeRO-3."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import distributed

from .helpers import EXPERTS_BACKENDS, run_isolated, tiny_model
from .ranks import Ranks, run_module, run_ranks


def run_layout(models: list[Path], layout: str, backends: tuple[str, ...]) -> Ranks:
    options = ("--models", *models, "--layout", layout, "--backends", *backends)
    return run_ranks(run_module, "tests.distributed_worker", *options)


STABILISED = {"iteration_norm": True, "branch_norm": True, "residual_scale": 2.0, "reinject": 0.5}
VARIANTS = {"plain": {}, "stabilised": {"prenorm_residual": True, **STABILISED}}


@pytest.mark.parametrize("layout", ["tensor parallel", "expert parallel", "sharded data and expert parallel"])
def test_equals_one_process(tmp_path, layout):
    # Equal lengths, so that the mean of two half batches is the mean of the batch; large aux loss, so that it counts.
    # The vocabulary is split over the ranks.
    fields = {"aux_loss_alpha": 0.5, "inner_iter": 2, "first_k_dense_replace": 1, "vocab_size": 100}
    for name, variant in VARIANTS.items():
        tiny_model(num_hidden_layers=3, **fields, **variant).save_pretrained(tmp_path / name)
    run = run_layout([tmp_path / name for name in VARIANTS], layout, EXPERTS_BACKENDS)
    if "requires `ep_size=tp_size`" in run.stderr:
        pytest.skip("before 5.20, transformers has expert parallel beside tensor parallel only")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))
    assert report == {"models": list(VARIANTS), "layout": layout, "backends": list(EXPERTS_BACKENDS)}


def test_experts_that_do_not_divide_are_refused(tmp_path):
    tiny_model(n_routed_experts=7, vocab_size=100).save_pretrained(tmp_path / "model")
    run = run_layout([tmp_path / "model"], "expert parallel", ("grouped_mm",))
    assert run.returncode != 0
    assert "`n_routed_experts=7` does not divide over `ep_size=2`. Set an `ep_size`" in run.stderr, run.stderr


def test_tied_embeddings_that_do_not_divide_are_refused():
    """Where tensor parallelism shards them first; FSDP2 alone trains them, see below."""
    model = tiny_model(tie_word_embeddings=True)
    layout = SimpleNamespace(fsdp_size=2, tp_size=2, ep_size=1, fsdp_mixed_precision=False)
    message = r"`vocab_size=99` does not divide over `fsdp_size \* tp_size = 4`.* Set `tie_word_embeddings=False`"
    with pytest.raises(ValueError, match=message):
        type(model).maybe_distribute_model(model, layout, mesh_manager=object())


def test_native_fsdp2(tmp_path):
    """Tied embeddings in padded shards train like one process, routers stay in float32, and what is saved loads."""
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    run = run_ranks(run_module, "tests.fsdp_worker", "native", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    folders = [tmp_path / "gathered", tmp_path / "distributed"]
    if not (Path(distributed.__file__).parent / "checkpoint.py").exists():
        del folders[1]  # before 5.20, transformers cannot load the distributed checkpoints that it writes
    run = run_isolated(LOAD, tmp_path, tmp_path / "single.pt", *folders)
    assert run.returncode == 0, run.stdout + run.stderr


LOAD = """
import torch
from transformers import AutoModelForCausalLM

expected, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    for name, tensor in torch.load(expected).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-4, rtol=0)
"""


def test_accelerate_fsdp2(tmp_path):
    """Trains like one process, is saved whole, and casts routers, of which it tells, unless they are units before."""
    pytest.importorskip("accelerate")
    run = run_ranks(run_module, "tests.fsdp_worker", "accelerate", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Routers are trained with weights in torch.bfloat16" in run.stderr


def test_saving_under_fsdp1_is_refused(tmp_path):
    run = run_ranks(run_module, "tests.fsdp_worker", "FSDP1", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr


def test_deepspeed_zero3(tmp_path):
    pytest.importorskip("deepspeed")
    run = run_ranks(run_module, "tests.zero3_worker", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
