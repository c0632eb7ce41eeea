"""`conversion/layout.py`: experts stored one by one or fused, written slice by slice, the same bits either way."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conversion import ConversionError, Options, convert, converter
from conversion.cli import main
from modeling_coe import CoeForCausalLM

from . import official
from .conversion_sources import MOE_SOURCES, edit_tensor, make_source, stored
from .helpers import ROOT, assert_equal_up_to_rounding, tiny_config, tiny_model


FUSED = Options(layout="fused")
IDS = torch.arange(5, 25)[None]


def load(folder, **kwargs):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def with_fused_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Written out: gate and up of an expert one above the other, experts one after the other."""
    fused = {key: tensor for key, tensor in tensors.items() if ".mlp.experts." not in key}
    for layer in {key.split(".mlp.experts.")[0] for key in tensors.keys() - fused.keys()}:
        experts, rows = f"{layer}.mlp.experts", {"gate_up_proj": [], "down_proj": []}
        while f"{experts}.{len(rows['down_proj'])}.down_proj.weight" in tensors:
            gate, up, down = (
                tensors[f"{experts}.{len(rows['down_proj'])}.{part}_proj.weight"] for part in ("gate", "up", "down")
            )
            rows["gate_up_proj"].append(torch.cat((gate, up)))
            rows["down_proj"].append(down)
        fused |= {f"{experts}.{name}": torch.stack(matrices) for name, matrices in rows.items()}
    return fused


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key in expected:
        assert actual[key].dtype == expected[key].dtype and torch.equal(actual[key], expected[key]), key


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of sources in several shards, which split layers and even experts."""
    root, folders = tmp_path_factory.mktemp("sources"), {}

    def source(name: str):
        if name not in folders:
            folders[name] = make_source(root / name, name)
        return folders[name]

    return source


@pytest.mark.parametrize("name", [name for name in MOE_SOURCES if "-" not in name])
def test_experts_are_fused(sources, tmp_path, name):
    source = sources(name)
    convert(source, tmp_path / "experts", Options(layout="experts"), verify_tokens=8)
    report = convert(source, tmp_path / "fused", FUSED, verify_tokens=8, max_shard_size="50KB")
    expected = with_fused_experts(stored(tmp_path / "experts"))
    assert_same_tensors(stored(tmp_path / "fused"), expected)
    assert report["exact"] and report["options"]["layout"] == "fused"
    assert report["tensors"]["written"] == len(expected) and report["tensors"]["bytes"] == sum(
        tensor.nbytes for tensor in expected.values()
    )
    index = json.loads((tmp_path / "fused" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == expected.keys() and len(set(index.values())) > 3
    with torch.no_grad():
        assert_equal_up_to_rounding(load(tmp_path / "fused")(IDS).logits, load(source)(IDS).logits)

    # And back: to the family, and to one tensor an expert.
    convert(tmp_path / "fused", tmp_path / "again", Options(layout="experts"), verify_tokens=8)
    assert_same_tensors(stored(tmp_path / "again"), stored(tmp_path / "experts"))
    convert(tmp_path / "fused", tmp_path / "back", Options(to="source"), verify_tokens=8)
    back, original = load(tmp_path / "back").state_dict(), load(source).state_dict()
    assert_same_tensors(back, original)


@pytest.mark.parametrize("upcycle", ["copy", "slice"])
def test_experts_of_dense_sources_are_fused(sources, tmp_path, upcycle):
    options = {"upcycle": upcycle, "experts": 4, "mode": "refine"}
    for layout in ("experts", "fused"):
        assert convert(sources("llama"), tmp_path / layout, Options(**options, layout=layout), verify_tokens=8)[
            "exact"
        ]
    assert_same_tensors(stored(tmp_path / "fused"), with_fused_experts(stored(tmp_path / "experts")))


def test_slices_are_written_one_by_one(sources, tmp_path, monkeypatch):
    """No fused tensor is in memory, and no tensor of the source is read twice for it."""
    sizes, reads = [], []
    write, read = converter.write_shard, converter.Checkpoint.read

    def write_and_count(folder, shard, tensors):
        write(folder, shard, (sizes.append(tensor.numel()) or (name, tensor) for name, tensor in tensors))

    monkeypatch.setattr(converter, "write_shard", write_and_count)
    monkeypatch.setattr(converter.Checkpoint, "read", lambda self, key: reads.append(key) or read(self, key))
    convert(sources("olmoe"), tmp_path / "out", FUSED, verify_tokens=8)
    tensors = stored(tmp_path / "out")
    largest = max(tensor.numel() for key, tensor in tensors.items() if ".mlp.experts." not in key)
    assert max(sizes) == largest < tensors["model.layers.0.mlp.experts.down_proj"].numel()
    assert len(reads) == len(set(reads)) == len(stored(sources("olmoe")))


def test_experts_of_two_precisions(sources, tmp_path):
    """A fused tensor has one, which holds the values of all."""
    source = make_source(tmp_path / "source", "olmoe", dtype=torch.bfloat16)
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensor(source, key, lambda weight: weight.float() + 1e-6)
    convert(source, tmp_path / "out", FUSED, verify_tokens=8)
    tensors = stored(tmp_path / "out")
    fused = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert fused.dtype == torch.float32 and torch.equal(fused[2].chunk(2)[1], stored(source)[key])
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16


def test_official_layout_of_a_fused_chain(tmp_path):
    """The official code reads one tensor for each expert."""
    folder = official.make_folder(tmp_path / "official", shards=3)
    convert(folder, tmp_path / "fused", FUSED, verify_tokens=8)
    assert_same_tensors(stored(tmp_path / "fused"), with_fused_experts(stored(folder)))
    convert(tmp_path / "fused", tmp_path / "back", Options(to="official"), verify_tokens=8)
    assert_same_tensors(stored(tmp_path / "back"), stored(folder))


def test_saving_keeps_the_layout_that_was_loaded(sources, tmp_path):
    for layout in ("experts", "fused"):
        convert(sources("mixtral"), tmp_path / layout, Options(layout=layout), verify_tokens=8)
        load(tmp_path / layout).save_pretrained(tmp_path / f"{layout} saved")
        assert_same_tensors(stored(tmp_path / f"{layout} saved"), stored(tmp_path / layout))
    load(tmp_path / "experts").save_pretrained(tmp_path / "other", save_original_format=False)
    fused = {key.replace("_scale.weight", "_scale"): tensor for key, tensor in stored(tmp_path / "other").items()}
    assert_same_tensors(fused, stored(tmp_path / "fused"))


def test_what_loads_with_load_state_dict(sources, tmp_path):
    """As `Trainer` resumes."""
    convert(sources("mixtral"), tmp_path / "out", FUSED, verify_tokens=8)
    model = CoeForCausalLM(AutoConfig.from_pretrained(tmp_path / "out"))
    model.load_state_dict(stored(tmp_path / "out"))
    assert_same_tensors(model.state_dict(), load(tmp_path / "out").state_dict())


@pytest.mark.parametrize("target", ["source", "official"])
def test_other_layouts_are_refused(tmp_path, capsys, target):
    tiny_model(inner_iter=1, prenorm_residual=True).save_pretrained(tmp_path / "chain")
    assert main([str(tmp_path / "chain"), str(tmp_path / "out"), "--to", target, "--layout", "fused"]) == 1
    assert f"Leave it out with `--to {target}`" in capsys.readouterr().err
    with pytest.raises(ConversionError, match="`--layout`"):
        convert(tmp_path / "chain", tmp_path / "out")


def test_dry_run_names_what_is_stored(sources, tmp_path, capsys):
    assert main([str(sources("olmoe")), str(tmp_path / "out"), "--layout", "fused", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    name = "model.layers.*.mlp.experts.gate_up_proj  [copied, fused"
    assert f"  16  model.layers.*.mlp.experts.*.up_proj.weight -> {name}" in printed


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell the peak of memory")
def test_fused_experts_load_in_little_more_than_their_memory(tmp_path):
    """Peak of a process of its own, less that of one that builds the model without weights."""
    config = tiny_config(hidden_size=256, moe_intermediate_size=256, n_routed_experts=64)
    CoeForCausalLM(config).save_pretrained(tmp_path / "experts")
    convert(tmp_path / "experts", tmp_path / "fused", FUSED, verify_tokens=2)
    script = (
        "import sys, torch, modeling_coe\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "with torch.device('meta'):\n"
        "    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))\n"
        "if sys.argv[2] == 'weights':\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )

    def peak(what: str) -> int:
        command = [sys.executable, "-c", script, str(tmp_path / "fused"), what]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return 1024 * int(run.stdout.split()[-1])

    weights = sum(tensor.nbytes for tensor in stored(tmp_path / "fused").values())
    assert weights > 5e7
    assert peak("weights") - peak("no weights") < 1.2 * weights
