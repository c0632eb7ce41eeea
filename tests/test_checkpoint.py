"""Saving and loading: both layouts, shards, dtypes, what is refused, and what a failed save leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    modeling_utils,
)

from modeling_coe import CoeConfig, CoeForCausalLM, CoeForSequenceClassification, CoeModel

from .helpers import ROOT, assert_equal_up_to_rounding, random_ids, tiny_config, tiny_model


FUSED = re.compile(r"\.experts\.(gate_up|down)_proj$")
PER_EXPERT = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$")


def stored_tensors(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def load_cleanly(folder, auto_class=AutoModelForCausalLM, **kwargs):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def assert_same_tensors(one, other):
    expected, actual = one.state_dict(), other.state_dict()
    assert expected.keys() == actual.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"], ids=["single file", "shards"])
@pytest.mark.parametrize("official_layout", [True, False], ids=["official layout", "fused layout"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"use_igate": False, "first_k_dense_replace": 1},
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_shared_experts": None},
    ],
    ids=["default", "tied", "one router", "selection bias"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, max_shard_size, official_layout, options, dtype):
    model = AutoModelForCausalLM.from_config(tiny_config(**options), dtype=dtype).eval()
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.data = torch.randn(buffer.shape)  # kept in float32
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size, save_original_format=official_layout)

    assert ((tmp_path / "model.safetensors.index.json").exists()) == (max_shard_size == "40KB")
    names = stored_tensors(tmp_path)
    layouts = [any(pattern.search(name) for name in names) for pattern in (PER_EXPERT, FUSED)]
    assert layouts == [official_layout, not official_layout]

    loaded = load_cleanly(tmp_path)
    assert type(loaded) is CoeForCausalLM and not loaded.training
    assert_same_tensors(model, loaded)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    input_ids = random_ids(2, 7)
    with torch.no_grad():  # in float32: two kernels may round a bfloat16 differently
        assert_equal_up_to_rounding(loaded.float()(input_ids).logits, model.float()(input_ids).logits)


def test_selection_bias_stays_in_float32(tmp_path):
    model = tiny_model(scoring_func="sigmoid", topk_method="noaux_tc")
    biases = [buffer for name, buffer in model.named_buffers() if "correction_bias" in name]
    for bias in biases:
        torch.nn.init.normal_(bias)
    model.save_pretrained(tmp_path)
    loaded = load_cleanly(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    loaded_biases = [buffer for name, buffer in loaded.named_buffers() if "correction_bias" in name]
    assert all(torch.equal(one, other) for one, other in zip(biases, loaded_biases, strict=True))


def test_layouts_convert_both_ways(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "official")
    load_cleanly(tmp_path / "official").save_pretrained(tmp_path / "fused", save_original_format=False)
    load_cleanly(tmp_path / "fused").save_pretrained(tmp_path / "again")
    assert any(FUSED.search(name) for name in stored_tensors(tmp_path / "fused"))
    assert_same_tensors(model, load_cleanly(tmp_path / "again"))


def test_official_checkpoint_is_written_back_under_official_names(reference_folder, tmp_path):
    for case in reference_folder.glob("*/"):
        model = load_cleanly(case)
        model.save_pretrained(tmp_path / case.name)
        official = load_file(case / "model.safetensors")
        rewritten = stored_tensors(tmp_path / case.name)
        assert official.keys() == rewritten.keys()
        assert all(torch.equal(official[name], rewritten[name]) for name in official)
        assert json.loads((tmp_path / case.name / "config.json").read_text())["model_type"] == "coe"


@pytest.mark.parametrize(
    "auto_class, new_keys",
    [
        (AutoModel, set()),
        (AutoModelForSequenceClassification, {"score.weight"}),
        (AutoModelForTokenClassification, {"score.weight", "score.bias"}),
        (AutoModelForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
    ],
)
def test_heads_load_a_causal_model_and_back(tmp_path, auto_class, new_keys):
    model = tiny_model()
    model.save_pretrained(tmp_path / "causal")
    head, info = auto_class.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert info["missing_keys"] == new_keys
    backbone = head if isinstance(head, CoeModel) else head.model
    assert_same_tensors(model.model, backbone)

    head.save_pretrained(tmp_path / "head")
    assert_same_tensors(head, load_cleanly(tmp_path / "head", auto_class))
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert_same_tensors(model.model, back.model)


def test_every_weight_is_initialised():
    model = tiny_model(scoring_func="sigmoid", topk_method="noaux_tc", initializer_range=0.02)
    for name, parameter in model.named_parameters():
        if "layernorm" in name or name == "model.norm.weight":
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
            assert parameter.mean().abs() < 0.005, name
    biases = [buffer for name, buffer in model.named_buffers() if "correction_bias" in name]
    assert len(biases) == 4 and not any(bias.any() for bias in biases)


def test_default_experts_backend_is_grouped_mm(tmp_path):
    model = CoeForCausalLM(tiny_config())
    assert model.config._experts_implementation == "grouped_mm"
    model.save_pretrained(tmp_path)
    assert load_cleanly(tmp_path).config._experts_implementation == "grouped_mm"
    for backend in ("eager", "batched_mm", "grouped_mm"):
        assert load_cleanly(tmp_path, experts_implementation=backend).config._experts_implementation == backend
        model.set_experts_implementation(backend)
        assert model.config._experts_implementation == backend
    with pytest.raises(ValueError, match='`experts_implementation="eager"`'):
        load_cleanly(tmp_path, experts_implementation="fastest")


class TestBadCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        return tmp_path

    def rewrite(self, folder, change):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    def fails(self, folder, *named, error=ValueError, **kwargs):
        with pytest.raises(error) as caught:
            AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        for text in named:
            assert text in str(caught.value)

    def test_missing_expert(self, folder):
        def change(tensors):
            for name in [name for name in tensors if "layers.1.mlp.experts.3." in name]:
                del tensors[name]

        self.rewrite(folder, change)
        self.fails(folder, "layers.1 lacks mlp.experts.3.down_proj.weight", "n_routed_experts=8")

    def test_missing_projection(self, folder):
        self.rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.7.up_proj.weight"))
        self.fails(folder, "layers.0 lacks mlp.experts.7.up_proj.weight")

    def test_extra_expert(self, folder):
        def change(tensors):
            for projection in ("gate", "up", "down"):
                name = "model.layers.0.mlp.experts.{}.{}_proj.weight"
                tensors[name.format(8, projection)] = tensors[name.format(0, projection)].clone()

        self.rewrite(folder, change)
        self.fails(folder, "layers.0 has, beyond the model's, mlp.experts.8.down_proj.weight", "n_routed_experts=8")

    def test_missing_fused_parameter(self, tmp_path):
        tiny_model().save_pretrained(tmp_path, save_original_format=False)
        self.rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.down_proj"))
        self.fails(tmp_path, "layers.1 lacks mlp.experts.down_proj")

    def test_missing_router(self, folder):
        self.rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.gate.1.weight"))
        self.fails(folder, "layers.0 lacks mlp.gate.1.weight", "inner_iter=2", "use_igate=True")

    def test_routers_of_the_other_kind(self, folder):
        self.fails(folder, "lacks mlp.gate.weight", "use_igate=False", use_igate=False)

    def test_more_iterations_than_routers(self, folder):
        self.fails(folder, "lacks mlp.gate.2.weight", "inner_iter=3", inner_iter=3)

    def test_missing_shared_expert(self, folder):
        self.rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.shared_experts.up_proj.weight"))
        self.fails(folder, "layers.0 lacks mlp.shared_experts.up_proj.weight", "n_shared_experts=1")

    def test_missing_selection_bias(self, tmp_path):
        tiny_model(scoring_func="sigmoid", topk_method="noaux_tc").save_pretrained(tmp_path)
        self.rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.gate.0.e_score_correction_bias"))
        self.fails(tmp_path, "layers.1 lacks mlp.gate.0.e_score_correction_bias")

    def test_fewer_iterations_than_routers(self, folder):
        self.fails(folder, "has, beyond the model's, mlp.gate.1.weight", "inner_iter=1", inner_iter=1)
        model = AutoModelForCausalLM.from_pretrained(folder, inner_iter=1, ignore_mismatched_sizes=True)
        assert len(model.model.layers[0].mlp.gate) == 1

    def test_pickled_weights(self, folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        self.fails(folder, "pytorch_model.bin", "not a safetensors file", error=OSError)

    def test_names_are_checked_after_the_callers_renaming(self, folder):
        expected = load_cleanly(folder)

        def change(tensors):
            for name in [name for name in tensors if ".gate." in name]:
                tensors[name.replace(".gate.", ".router.")] = tensors.pop(name)

        self.rewrite(folder, change)
        self.fails(folder, "lacks mlp.gate.0.weight")
        assert_same_tensors(expected, load_cleanly(folder, key_mapping={r"\.mlp\.router\.": ".mlp.gate."}))

    def test_checkpoint_of_nothing_is_reported_by_transformers(self, folder):
        save_file({"tensor": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"] == set(model.state_dict())
        assert info["unexpected_keys"] == {"tensor"}

    def test_random_routers_on_request(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder, inner_iter=3, ignore_mismatched_sizes=True)
        assert all(router.weight.any() for layer in model.model.layers for router in layer.mlp.gate)

    def test_truncated_file(self, folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        self.fails(folder, "model.safetensors", "truncated", error=OSError)

    def test_truncated_shard(self, tmp_path):
        tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
        shard = sorted(tmp_path.glob("model-00002-of-*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-8])
        self.fails(tmp_path, shard.name, "truncated", error=OSError)

    def test_configuration_of_another_architecture(self, folder):
        LlamaConfig(hidden_size=32, num_attention_heads=4).save_pretrained(folder)
        with pytest.raises(ValueError, match="`model_type` is 'llama'"):
            CoeForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match="`model_type` is 'llama'"):
            CoeConfig.from_pretrained(folder)

    def test_field_of_the_configuration(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 9}))
        with pytest.raises(ValueError, match=r"num_experts_per_tok.*9"):
            AutoConfig.from_pretrained(folder)
        self.fails(folder, "num_experts_per_tok")


class TestFailedSave:
    @pytest.fixture
    def disk_full_on_second_shard(self, monkeypatch):
        written = []
        save = modeling_utils.safe_save_file

        def fail_late(tensors, filename, **kwargs):
            if written:
                raise OSError(28, "No space left on device")
            written.append(filename)
            save(tensors, filename, **kwargs)

        monkeypatch.setattr(modeling_utils, "safe_save_file", fail_late)

    def test_leaves_nothing_new(self, tmp_path, disk_full_on_second_shard):
        with pytest.raises(OSError, match="No space left"):
            tiny_model().save_pretrained(tmp_path / "model", max_shard_size="40KB")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
    def test_leaves_the_old_checkpoint_whole(self, tmp_path, max_shard_size, request):
        folder, old = tmp_path / "model", tiny_model(seed=1)
        old.save_pretrained(folder, max_shard_size=max_shard_size)
        request.getfixturevalue("disk_full_on_second_shard")
        with pytest.raises(OSError, match="No space left"):
            tiny_model(seed=2).save_pretrained(folder, max_shard_size="40KB")
        assert list(tmp_path.iterdir()) == [folder]
        assert_same_tensors(old, load_cleanly(folder))

    @pytest.mark.parametrize("sizes", [("5GB", "40KB"), ("40KB", "5GB"), ("40KB", "60KB")])
    def test_overwriting_leaves_no_file_of_the_old_checkpoint(self, tmp_path, sizes):
        folder, new = tmp_path / "model", tiny_model(seed=2)
        tiny_model(seed=1).save_pretrained(folder, max_shard_size=sizes[0])
        (folder / "tokenizer.json").write_text("kept")
        new.save_pretrained(folder, max_shard_size=sizes[1])
        assert_same_tensors(new, load_cleanly(folder))
        assert len(stored_tensors(folder)) == sum(len(load_file(f)) for f in folder.glob("*.safetensors"))
        assert (folder / "tokenizer.json").read_text() == "kept"

    def test_overwriting_a_variant_leaves_the_plain_checkpoint(self, tmp_path):
        plain, first, second = (tiny_model(seed=seed) for seed in range(3))
        plain.save_pretrained(tmp_path)
        first.save_pretrained(tmp_path, variant="fp16", max_shard_size="40KB")
        second.save_pretrained(tmp_path, variant="fp16")
        assert_same_tensors(plain, load_cleanly(tmp_path))
        assert_same_tensors(second, load_cleanly(tmp_path, variant="fp16"))
        weights = {file.name for file in tmp_path.glob("model*") if file.suffix != ".py"}
        assert weights == {"model.safetensors", "model.fp16.safetensors"}

    def test_a_failure_while_replacing_is_undone(self, tmp_path, monkeypatch):
        folder, old = tmp_path / "model", tiny_model(seed=1)
        old.save_pretrained(folder, max_shard_size="40KB")
        before = {file.name for file in folder.iterdir()}
        replace, moved = Path.replace, []

        def fails_once(source, target):
            moved.append(target)
            if len(moved) == len(before) + 4:  # all old files are aside, some new ones are in place
                raise OSError(28, "No space left on device")
            return replace(source, target)

        monkeypatch.setattr(Path, "replace", fails_once)
        with pytest.raises(OSError, match="No space left"):
            tiny_model(seed=2).save_pretrained(folder, max_shard_size="40KB")
        assert {file.name for file in folder.iterdir()} == before
        assert_same_tensors(old, load_cleanly(folder))

    def test_a_process_killed_while_replacing_leaves_nothing_that_loads(self, tmp_path):
        folder = tmp_path / "model"
        script = f"""
import os, signal
from pathlib import Path
from tests.helpers import tiny_model

tiny_model(seed=1).save_pretrained({str(folder)!r}, max_shard_size="40KB")
replace, moved = Path.replace, []

def killed(source, target):
    moved.append(target)
    if len(moved) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)

Path.replace = killed
tiny_model(seed=2).save_pretrained({str(folder)!r}, max_shard_size="40KB")
"""
        run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert run.returncode == -signal.SIGKILL
        assert not (folder / "config.json").exists()
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
        new = tiny_model(seed=3)
        new.save_pretrained(folder)
        assert_same_tensors(new, load_cleanly(folder))


def test_state_dict_of_either_layout_loads_in_place(tmp_path):
    """As `Trainer` does to resume a run: `load_state_dict` on a saved file, whole or shard by shard."""
    saved = tiny_model(seed=1)
    for official_layout in (True, False):
        saved.save_pretrained(tmp_path, max_shard_size="40KB", save_original_format=official_layout)
        tensors = stored_tensors(tmp_path)
        model = tiny_model(seed=2)
        model.load_state_dict(tensors)
        assert_same_tensors(saved, model)
        model = tiny_model(seed=2)
        for shard in tmp_path.glob("*.safetensors"):
            model.load_state_dict(load_file(shard), strict=False)
        assert_same_tensors(saved, model)
        with torch.device("meta"):
            model = CoeForCausalLM(saved.config)
        model.load_state_dict(tensors, assign=True)
        assert_same_tensors(saved, model)


class TestLoadStateDict:
    """What torch promises of `load_state_dict` holds in the official layout as if each expert had its parameters."""

    def official(self, folder, **overrides) -> dict[str, torch.Tensor]:
        tiny_model(seed=1, **overrides).save_pretrained(folder)
        return stored_tensors(folder)

    def test_missing_tensors_are_missing(self, tmp_path):
        stored = self.official(tmp_path)
        lacking = {key: tensor for key, tensor in stored.items() if ".0.mlp.experts.3.up_proj" not in key}
        (absent,) = stored.keys() - lacking.keys()
        model = tiny_model(seed=2)
        with pytest.raises(RuntimeError, match=re.escape(f'Missing key(s) in state_dict: "{absent}".')):
            model.load_state_dict(lacking)
        model = tiny_model(seed=2)
        before = model.model.layers[0].mlp.experts.gate_up_proj[3].clone()
        result = model.load_state_dict(lacking, strict=False)
        assert result.missing_keys == [absent] and not result.unexpected_keys
        after = model.model.layers[0].mlp.experts.gate_up_proj[3]
        gate, up = after.chunk(2)
        assert torch.equal(up, before.chunk(2)[1]), "what is missing stays as it is"
        assert torch.equal(gate, stored[absent.replace("up_proj", "gate_proj")])
        others = {
            name: tensor for name, tensor in model.state_dict().items() if "layers.0.mlp.experts.gate" not in name
        }
        expected = tiny_model(seed=1).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in others.items())

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 2**31), share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), assign=st.booleans())
    def test_any_part_of_the_experts(self, tmp_path_factory, seed, share, assign):
        """Against a module in which every expert's projections are parameters, as they are named on disk."""
        stored = self.official(tmp_path_factory.mktemp("official"))
        generator = torch.Generator().manual_seed(seed)
        given = {key: tensor for key, tensor in stored.items() if torch.rand((), generator=generator) < share}
        model = tiny_model(seed=2)
        tiny_model(seed=2).save_pretrained(folder := tmp_path_factory.mktemp("model"))
        expected = stored_tensors(folder)
        model.load_state_dict(given, strict=False, assign=assign)
        model.save_pretrained(folder)
        for key, tensor in stored_tensors(folder).items():
            assert torch.equal(tensor, given.get(key, expected[key])), key

    def test_unexpected_tensors_are_unexpected(self, tmp_path):
        stored = self.official(tmp_path)
        extra = {f"model.layers.1.mlp.experts.8.{name}_proj.weight": torch.zeros(24, 32) for name in ("gate", "up")}
        result = tiny_model(seed=2).load_state_dict(stored | extra, strict=False)
        assert set(result.unexpected_keys) == extra.keys() and not result.missing_keys
        # Both layouts at once: the fused one is the parameter's own, and the other one too much.
        both = tiny_model(seed=3).state_dict() | {key: t for key, t in stored.items() if ".0.mlp.experts.0." in key}
        model = tiny_model(seed=2)
        assert len(model.load_state_dict(both, strict=False).unexpected_keys) == 3
        assert_same_tensors(model, tiny_model(seed=3))

    @pytest.mark.parametrize("shape", [(24, 31), (1, 32), (32,), ()], ids=str)
    def test_other_shapes_are_errors(self, tmp_path, shape):
        key = "model.layers.1.mlp.experts.5.gate_proj.weight"
        stored = self.official(tmp_path) | {key: torch.zeros(shape)}
        for strict in (True, False):
            model = tiny_model(seed=2)
            with pytest.raises(RuntimeError, match=re.escape(f"size mismatch for {key}: the shape is {list(shape)}")):
                model.load_state_dict(stored, strict=strict)
            assert torch.equal(
                model.model.layers[1].mlp.experts.gate_up_proj,
                tiny_model(seed=2).model.layers[1].mlp.experts.gate_up_proj,
            )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_assign_takes_what_is_stored(self, tmp_path, dtype):
        stored = {key: tensor.to(dtype) for key, tensor in self.official(tmp_path).items()}
        model = tiny_model(seed=2)
        model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
        model.load_state_dict(stored)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        model.load_state_dict(stored, assign=True)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert frozen == ["model.layers.0.mlp.experts.down_proj"]
        # A part in another dtype: no value is rounded.
        model = tiny_model(seed=2).to(torch.bfloat16)
        before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
        key = "model.layers.0.mlp.experts.5.down_proj.weight"
        model.load_state_dict({key: stored[key]}, strict=False, assign=True)
        after = model.model.layers[0].mlp.experts.down_proj
        assert after.dtype == dtype and torch.equal(after[5], stored[key])
        assert torch.equal(after[:5].to(torch.bfloat16), before[:5])

    def test_an_incomplete_state_dict_leaves_a_meta_model_on_meta(self, tmp_path):
        """Memory that nobody has written must not pass for weights."""
        stored = self.official(tmp_path)
        lacking = {key: tensor for key, tensor in stored.items() if ".1.mlp.experts.7." not in key}
        with torch.device("meta"):
            model = CoeForCausalLM(tiny_config())
        result = model.load_state_dict(lacking, strict=False, assign=True)
        left = {name for name, parameter in model.named_parameters() if parameter.is_meta}
        assert left == {f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
        assert left <= set(result.missing_keys) and stored.keys() - lacking.keys() <= set(result.missing_keys)
        assert len(result.unexpected_keys) == 7 * 3
        with torch.device("meta"):
            model = CoeForCausalLM(tiny_config())
        with pytest.raises(RuntimeError, match=r"experts\.7\.down_proj"):
            model.load_state_dict(lacking, assign=True)

    def test_prefixes_and_the_caller_s_dictionary(self, tmp_path):
        stored = self.official(tmp_path, upcycling="refine")
        names = set(stored)
        wrapper = torch.nn.ModuleDict({"inner": tiny_model(seed=2, upcycling="refine")})
        wrapper.load_state_dict({f"inner.{key}": tensor for key, tensor in stored.items()})
        assert_same_tensors(wrapper["inner"], tiny_model(seed=1, upcycling="refine"))
        layer = tiny_model(seed=2, upcycling="refine").model.layers[1]
        prefix = "model.layers.1."
        part = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
        layer.load_state_dict(part)
        assert_same_tensors(layer, wrapper["inner"].model.layers[1])
        assert stored.keys() == names

    def test_scales_under_their_name_on_disk(self, tmp_path):
        model = tiny_model(seed=1, upcycling="split")
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.iteration_scale.weight)
        for official_layout in (True, False):
            model.save_pretrained(tmp_path, save_original_format=official_layout)
            stored = stored_tensors(tmp_path)
            name = "iteration_scale" if official_layout else "iteration_scale.weight"
            assert {key for key in stored if "scale" in key} == {f"model.layers.{i}.{name}" for i in range(2)}
            again = tiny_model(seed=2, upcycling="split")
            again.load_state_dict(stored)
            assert_same_tensors(again, model)
            assert_same_tensors(load_cleanly(tmp_path), model)
            del stored[f"model.layers.1.{name}"]
            with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.iteration_scale"):
                again.load_state_dict(stored)


def test_adapter_folder_loads_through_the_auto_class(tmp_path):
    from peft import LoraConfig, get_peft_model

    tiny_model().save_pretrained(tmp_path / "base")
    config = LoraConfig(
        target_modules=["q_proj", "o_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
    )
    adapted = get_peft_model(load_cleanly(tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    input_ids = random_ids(2, 7)
    with torch.no_grad():
        expected = adapted.eval()(input_ids).logits
        actual = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(input_ids).logits
        assert not torch.allclose(expected, load_cleanly(tmp_path / "base")(input_ids).logits)
    assert_equal_up_to_rounding(actual, expected)


def test_saved_folder_names_its_code(tmp_path):
    CoeForSequenceClassification(tiny_config()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_coe.CoeModel"
    assert auto_map["AutoModelForCausalLM"] == "modeling_coe.CoeForCausalLM"
    for reference in auto_map.values():
        assert (tmp_path / f"{reference.split('.')[0]}.py").exists()
