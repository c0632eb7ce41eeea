"""`recipe.trainer_checkpoints`: which checkpoints are whole, of every engine, and what happens with the others."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from recipe.job import find_checkpoint
from recipe.run_folder import checkpoints_in
from recipe.trainer_checkpoints import engine_of, newest_complete_checkpoint


MODEL = ("config.json", "model.safetensors")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
RANKS = ("rng_state_0.pth", "rng_state_1.pth")
# What `Trainer` writes beside trainer_state.json; a name that ends in / is a folder of distributed tensors.
LAYOUTS = {
    "one process": (*MODEL, "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    "one process, adapter": (*ADAPTER, "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    "DDP": (*MODEL, "optimizer.pt", "scheduler.pt", *RANKS),
    "DDP, adapter": (*ADAPTER, "optimizer.pt", "scheduler.pt", *RANKS),
    "FSDP full": (*MODEL, "pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", *RANKS),
    "FSDP full, adapter": (*ADAPTER, "pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", *RANKS),
    "FSDP sharded": ("pytorch_model_fsdp_0/", "optimizer_0/", "scheduler.pt", *RANKS),
    "DeepSpeed": (*MODEL, "latest", "global_step8/mp_rank_00_model_states.pt", *RANKS),
}


def write_checkpoint(output_dir: Path, step: int, layout: str = "one process", without: str = "") -> Path:
    """An imitated checkpoint: `is_complete` looks at names, at indices, and at the trainer's state."""
    folder = output_dir / f"checkpoint-{step}"
    for name in LAYOUTS[layout]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            dcp.save({"tensor": torch.zeros(2)}, checkpoint_id=path, no_dist=True)
        else:
            path.write_text("global_step8" if name == "latest" else "")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if without.endswith("/"):
        next((folder / without).glob("*.distcp")).unlink()
    elif without:
        (folder / without).unlink()
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_every_engine_are_kept(tmp_path, layout):
    older, newer = write_checkpoint(tmp_path, 4, layout), write_checkpoint(tmp_path, 8, layout)
    files = sorted(tmp_path.rglob("*"))
    assert newest_complete_checkpoint(tmp_path) == newer and older.exists()
    assert sorted(tmp_path.rglob("*")) == files
    assert engine_of(newer) == ("DeepSpeed" if layout == "DeepSpeed" else "FSDP" if "FSDP" in layout else "no engine")


# `Trainer` does without random states of other processes, and with DeepSpeed's states without the gathered weights;
# without `latest`, nothing tells that it is DeepSpeed's.
NEEDED = [
    (layout, name)
    for layout, names in LAYOUTS.items()
    for name in (*names, "trainer_state.json")
    if name not in ("rng_state_1.pth", "latest") and (layout != "DeepSpeed" or name not in MODEL)
]


@pytest.mark.parametrize("layout, without", NEEDED, ids=[" without ".join(each) for each in NEEDED])
def test_incomplete_ones_are_renamed(tmp_path, capsys, layout, without):
    complete, incomplete = write_checkpoint(tmp_path, 4, layout), write_checkpoint(tmp_path, 8, layout, without)
    files = {path.relative_to(incomplete) for path in incomplete.rglob("*")}
    assert newest_complete_checkpoint(tmp_path) == complete
    aside = tmp_path / "incomplete-checkpoint-8"
    assert not incomplete.exists() and {path.relative_to(aside) for path in aside.rglob("*")} == files
    assert "checkpoint-8 was not written in full" in capsys.readouterr().out


def test_the_newest_is_chosen(tmp_path):
    write_checkpoint(tmp_path, 2)
    newest = write_checkpoint(tmp_path, 10)  # after 9 in numbers, before it in letters
    write_checkpoint(tmp_path, 9)
    states = {11: '{"global_step": 1', 12: "[]", 13: '{"global_step": 1}', 14: ""}
    for step, text in states.items():
        (write_checkpoint(tmp_path, step) / "trainer_state.json").write_text(text)
    assert newest_complete_checkpoint(tmp_path) == newest
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"checkpoint-{step}" for step in (2, 9, 10)]


def test_shards(tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    for step, shards in ((2, index["weight_map"].values()), (4, ["model-00001-of-00002.safetensors"])):
        folder = write_checkpoint(tmp_path, step, without="model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for shard in shards:
            (folder / shard).touch()
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()


def test_what_others_keep_there_stays(tmp_path):
    """No checkpoint by its name, or one that was set aside before."""
    others = [tmp_path / name for name in ("checkpoint-best", "checkpoints", "incomplete-checkpoint-8", "notes.txt")]
    for other in others:
        other.mkdir()
    write_checkpoint(tmp_path, 8, without="optimizer.pt")
    assert newest_complete_checkpoint(tmp_path) is None
    assert all(other.exists() for other in others) and (tmp_path / "incomplete-checkpoint-8-1").is_dir()


def test_what_a_killed_save_has_left_is_removed(tmp_path, capsys):
    half = tmp_path / "model" / ".abc.partial"
    half.mkdir(parents=True)
    newest = write_checkpoint(tmp_path, 8)
    assert find_checkpoint(tmp_path) == newest
    assert not half.exists() and half.name in capsys.readouterr().out
