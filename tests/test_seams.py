"""What this project takes from other libraries without their promise: private names, and what no documentation states.
A failure names what has gone, and what of this project no longer works.
"""

import ast
import functools
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, StrictDataclassError
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2ForCausalLM,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    modeling_utils,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.distributed import DistributedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation.continuous_batching import ContinuousMixin
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    _grouped_linear,
    use_experts_implementation,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Experts,
    DeepseekV2PreTrainedModel,
    DeepseekV2TopkRouter,
)
from transformers.utils import hub, output_capturing

import modeling_coe.callbacks  # noqa: F401  not imported by the package itself
from model_cards import cards
from modeling_coe import CoeForCausalLM, CoeModel
from modeling_coe.adapters import low_rank_factors, obstacle
from modeling_coe.attention import CoeAttention
from modeling_coe.modeling_coe import CoeExperts, CoePreTrainedModel, CoeRouter
from modeling_coe.releases import CACHE

from .helpers import ROOT, enable_checkpointing, random_ids, tiny_config, tiny_model


PACKAGES = ("configuration_coe", "modeling_coe", "model_cards", "conversion", "vllm_coe")
FOLDERS = (*PACKAGES, "examples", "benchmarks", "tests")
NAMED_TUPLE = {"_asdict", "_fields", "_replace"}  # documented by Python


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def used_names(tree: ast.AST) -> Iterator[str]:
    """Private names that a source reads from something: attributes, by name too, and what it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call):
            function = getattr(node.func, "id", getattr(node.func, "attr", None))
            if function in ("hasattr", "getattr", "setattr", "delattr"):
                names = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
                yield from (name for name in names if isinstance(name, str))


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Names that a source gives to something: functions, classes, variables and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def test_every_private_name_is_in_this_file():
    """Or in that of vLLM's names beside it, which cannot be imported without vLLM."""
    here = [ROOT / "tests" / "test_seams.py", ROOT / "tests" / "vllm" / "test_seams.py"]
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path not in here]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    defined = {name for tree in trees for name in defined_names(tree)}
    foreign = {name for tree in trees for name in used_names(tree)} - defined
    # What a class of ours overrides is defined here and belongs to a base of another library all the same.
    for module in [module for name, module in sys.modules.items() if is_ours(name)]:
        for item in vars(module).values():
            if isinstance(item, type) and is_ours(item.__module__):
                bases = [base for base in item.__mro__ if not is_ours(base.__module__)]
                foreign |= {name for name in vars(item).keys() & defined if any(name in vars(base) for base in bases)}

    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in here]
    strings = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    strings |= {name for tree in trees for name in used_names(tree)}
    missing = sorted(filter(is_private, foreign - strings - NAMED_TUPLE))
    assert not missing, f"private names of other libraries of which nothing here says what they are for: {missing}"


class TestLoading:
    """`from_pretrained`, the conversion, and what a checkpoint must hold."""

    def test_load_pretrained_model(self, tmp_path, monkeypatch):
        parameters = list(inspect.signature(PreTrainedModel._load_pretrained_model).parameters)
        assert parameters[:4] == ["model", "state_dict", "checkpoint_files", "load_config"], (
            "`_load_pretrained_model` takes others: an incomplete checkpoint would load, missing routers at random"
        )
        assert "expected_keys" in parameters, "an adapter cannot be told from a whole model when one is loaded"
        tiny_model().save_pretrained(tmp_path)
        calls = []

        def load(model, state_dict, checkpoint_files, load_config, **kwargs):
            calls.append((state_dict, checkpoint_files, load_config, kwargs))
            return original(model, state_dict, checkpoint_files, load_config, **kwargs)

        original = PreTrainedModel._load_pretrained_model
        monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", load)
        AutoModelForCausalLM.from_pretrained(tmp_path)
        assert calls, "`from_pretrained` goes elsewhere: incomplete checkpoints would load, missing routers at random"
        ((state_dict, files, load_config, kwargs),) = calls
        assert state_dict is None and [str(file) for file in files] == [str(tmp_path / "model.safetensors")], (
            "the files of a whole model are not told: their keys cannot be checked"
        )
        assert "expected_keys" not in kwargs, "a whole model is told like an adapter, and would not be checked"
        assert load_config.hf_quantizer is None and load_config.ignore_mismatched_sizes is False, (
            "what turns the check of a checkpoint off cannot be read"
        )
        assert any(isinstance(transform, WeightConverter) for transform in load_config.weight_mapping), (
            "`weight_mapping` does not hold the conversions: renamed keys could not be checked"
        )

    def test_loading_some_tensors(self):
        with torch.device("meta"):
            model = tiny_model()
        tensors = {"model.norm.weight": torch.full((32,), 2.0)}
        load_config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=get_model_conversion_mapping(model))
        info, _ = type(model)._load_pretrained_model(model, tensors, None, load_config)
        assert model.model.norm.weight.eq(2).all(), "`coe-convert` cannot load a layer at a time to verify its result"
        assert not (info.conversion_errors or info.error_msgs or info.mismatched_keys), (
            "`coe-convert` cannot tell what failed to load"
        )

    def test_deferred_loading(self, tmp_path):
        """A subclass takes the place of the class that `from_pretrained` was asked for, and of its loading."""
        tiny_model().save_pretrained(tmp_path)
        calls = []

        def load(model, state_dict, checkpoint_files, load_config):
            calls.append(checkpoint_files)
            info, _ = CoeForCausalLM._load_pretrained_model(model, {}, None, load_config)
            info.missing_keys.clear()
            return info, None

        names = {"__module__": CoeForCausalLM.__module__, "_load_pretrained_model": staticmethod(load)}
        model = type("CoeForCausalLM", (CoeForCausalLM,), names).from_pretrained(tmp_path)
        assert [str(file) for file in calls[0]] == [str(tmp_path / "model.safetensors")], (
            "`coe-convert` would verify other files than `from_pretrained` loads"
        )
        assert all(parameter.is_meta for parameter in model.parameters()), (
            "`coe-convert` would have a whole model in memory to verify its result"
        )
        assert torch.equal(model.model.rotary_emb.inv_freq, tiny_model().model.rotary_emb.inv_freq), (
            "what is in no checkpoint is not computed: `coe-convert` would verify garbage"
        )

    def test_resolved_checkpoint_files(self, tmp_path):
        def resolve(explicit=None):
            files, index = modeling_utils._get_resolved_checkpoint_files(
                str(tmp_path),
                variant=None,
                gguf_file=None,
                use_safetensors=None,
                user_agent=None,
                is_remote_code=False,
                transformers_explicit_filename=explicit,
            )
            return [Path(file).relative_to(tmp_path).as_posix() for file in files], index

        message = "`coe-convert` reads other files than transformers, or none"
        with pytest.raises(OSError):
            resolve()
        index = {"metadata": {}, "weight_map": {"a": "x.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        files, found = resolve()
        assert files == ["x.safetensors"] and found["weight_map"] == {"a": "x.safetensors"}, message
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert resolve() == (["model.safetensors"], None), message
        assert resolve("y.safetensors") == (["y.safetensors"], None), message

    def test_conversion_mapping(self):
        mapping = get_checkpoint_conversion_mapping("deepseek_v2")
        experts = {target for part in mapping if isinstance(part, WeightConverter) for target in part.target_patterns}
        assert {name.rpartition(".")[2] for name in experts} >= {"gate_up_proj", "down_proj"}, (
            "DeepSeek-V2's mapping no longer fuses experts: official checkpoints would not load"
        )
        model = tiny_model()
        mapping = get_model_conversion_mapping(model)
        converters = [part for part in mapping if isinstance(part, WeightConverter)]
        renamings = [part for part in mapping if isinstance(part, WeightRenaming)]
        key, prefix = "model.layers.0.mlp.experts.0.up_proj.weight", model.base_model_prefix
        name, _ = rename_source_key(key, renamings, converters, prefix, model.state_dict())
        assert name == "model.layers.0.mlp.experts.gate_up_proj", "`coe-convert` cannot tell which layer a key is of"
        assert key in revert_weight_conversion(model, model.state_dict()), (
            "`coe-convert` does not know the names that a model has on disk"
        )
        assert WeightRenaming("a.", "b.").rename_source_key("a.weight")[0] == "b.weight", (
            "the check of a checkpoint cannot follow renamed keys"
        )
        assert set(tiny_model(tie_word_embeddings=True).all_tied_weights_keys) == {"lm_head.weight"}, (
            "`coe-convert` would ask for a head that is tied"
        )

    def test_block_scaled_weights(self, tmp_path):
        weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(torch.float8_e4m3fn)
        tensors = {"a.weight": weight, "a.weight_scale_inv": torch.tensor([[2.0, 10.0]])}
        (dequantized,) = Fp8Dequantize(hf_quantizer=None).convert(tensors)["a.weight"]
        assert dequantized.tolist() == [[2, 20], [6, 40]] and dequantized.dtype == torch.float32, (
            "`coe-convert` does not know what weights in FP8 stand for"
        )
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            quantization_config={"quant_method": "fp8", "weight_block_size": [4, 2]},
        )
        plain = LlamaConfig.from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
        LlamaForCausalLM(plain).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(config.to_json_string())
        calls = []

        def load(model, state_dict, checkpoint_files, load_config):
            calls.append((model, load_config))
            return LlamaForCausalLM._load_pretrained_model(model, state_dict, checkpoint_files, load_config)

        names = {"__module__": LlamaForCausalLM.__module__, "_load_pretrained_model": staticmethod(load)}
        fp8 = FineGrainedFP8Config(dequantize=True)
        type("LlamaForCausalLM", (LlamaForCausalLM,), names).from_pretrained(tmp_path, quantization_config=fp8)
        ((model, load_config),) = calls
        assert list(load_config.hf_quantizer.quantization_config.weight_block_size) == [4, 2], (
            "`coe-convert` verifies weights in FP8 with scales for other blocks"
        )
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear, "`coe-convert` verifies what is still quantised"

    def test_type_of_other_code(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "other", "vocab_size": 8}')
        config = AutoConfig.from_pretrained(tmp_path, model_type="llama")
        assert type(config) is LlamaConfig and config.model_type == "llama" and config.vocab_size == 8, (
            "`coe-convert` cannot load a source whose `model_type` transformers does not know"
        )

    def test_initialization(self):
        model = tiny_model(initializer_range=0.3)
        for module in (model.model.layers[0].mlp.gate[0], model.model.layers[0].mlp.experts):
            for name, parameter in module.named_parameters():
                nn.init.zeros_(parameter)
                DeepseekV2PreTrainedModel._init_weights(model, module)
                assert 0.2 < parameter.std() < 0.4, f"DeepSeek-V2's `_init_weights` leaves `{name}` out: it is garbage"
        loaded = torch.ones(2)
        loaded._is_hf_initialized = True
        init.zeros_(loaded)
        assert loaded.all(), "loaded `iteration_scale`s and selection biases would be set to zero again"

    def test_float32_modules(self, tmp_path):
        tiny_model(topk_method="noaux_tc").save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        tensors = [tensor for name, tensor in model.state_dict().items() if ".gate." in name]
        assert model._keep_in_fp32_modules_strict and {tensor.dtype for tensor in tensors} == {torch.float32}, (
            "`_keep_in_fp32_modules_strict` has no effect: routers and selection biases are rounded"
        )

    def test_fields_of_configurations(self):
        assert {field.name: field.default for field in fields(LlamaConfig())}["hidden_act"] == "silu", (
            "configurations are no dataclasses: `coe-convert` cannot tell a field that is set from a default"
        )
        assert "_name_or_path" in LlamaConfig().to_dict(), "tests compare configurations without the folder's name"


class TestModels:
    """What a model declares, and what transformers does about it."""

    def test_plans(self):
        model = tiny_model(tie_word_embeddings=True)
        assert model._tied_weights_keys and model.lm_head.weight is model.model.embed_tokens.weight, (
            "`_tied_weights_keys` has no effect: the output head is not tied"
        )
        assert model._no_split_modules == {"CoeDecoderLayer"}, "a device map may cut a layer, and its residual, in two"
        assert model._tp_plan["lm_head"] == "colwise_gather_output", "tensor parallelism leaves the output head out"
        assert "model.layers.*.mlp.experts.gate_up_proj" in model._tp_plan, (
            "the plan of the configuration is not joined to the model's: tensor parallelism leaves the experts whole"
        )
        assert "lm_head" in model._pp_plan, "pipeline parallelism leaves the output head out"
        assert "lm_head" in model._fsdp_plan, "FSDP2 shards the output head"
        for name in ("_no_split_modules", "_tied_weights_keys", "_tp_plan", "_pp_plan", "_fsdp_plan"):
            assert hasattr(PreTrainedModel, name), f"transformers reads `{name}` no more"

    def test_recording(self):
        model = tiny_model()
        assert model._can_record_outputs.keys() >= {"router_logits", "router_indices"}, (
            "routing statistics do not find a Chain-of-Experts model inside another"
        )
        routers = [module for module in model.modules() if isinstance(module, CoeRouter)]
        assert (
            all(len(router._forward_hooks) == 2 for router in routers)
            and model.model._output_capturing_hooks_installed
        )
        output_capturing.maybe_install_capturing_hooks(model.model)
        assert all(len(router._forward_hooks) == 2 for router in routers), (
            "`_output_capturing_hooks_installed` is not read: every router would be recorded, and balanced, twice"
        )
        module = nn.Module()
        output_capturing.install_output_capuring_hook(module, "router_logits", 0)
        assert len(module._forward_hooks) == 1, "`install_output_capuring_hook` installs another number of hooks"

        class Other(CoeModel):
            pass

        assert str(Other) in output_capturing._CAN_RECORD_REGISTRY
        other = CoeModel(tiny_config())
        other.__class__ = Other  # as FSDP2 does
        assert other(random_ids(1, 5), output_router_logits=True).router_logits, (
            "`_CAN_RECORD_REGISTRY` has other keys: sharded and unpickled models record no routers, and balance none"
        )
        with torch.no_grad():
            outputs = model.model(random_ids(1, 5), output_router_logits=True, output_router_indices=True)
        assert [logits.shape for logits in outputs.router_logits] == [(5, 8)] * 4, (
            "`OutputRecorder(index=0)` does not record what a router returns first: there is no balancing loss"
        )
        assert [index.shape for index in outputs.router_indices] == [(5, 2)] * 4, (
            "`OutputRecorder(index=2)` does not record what a router returns third: there is no balancing loss"
        )

    def test_checkpointing(self, monkeypatch):
        calls = []

        def set_checkpointing(self, enable=True, **kwargs):
            calls.append(kwargs.get("gradient_checkpointing_func"))
            return original(self, enable, **kwargs)

        original = PreTrainedModel._set_gradient_checkpointing
        monkeypatch.setattr(PreTrainedModel, "_set_gradient_checkpointing", set_checkpointing)
        model = tiny_model()
        enable_checkpointing(model, {"use_reentrant": False})
        assert calls and isinstance(calls[0], functools.partial) and calls[0].keywords == {"use_reentrant": False}, (
            "`_set_gradient_checkpointing` is not asked: reentrant checkpointing, which cuts the gradient of the "
            "router losses, is refused later than it could be"
        )
        assert model.model._gradient_checkpointing_func is calls[0] and model.model.gradient_checkpointing, (
            "how a model checkpoints cannot be read: reentrant checkpointing would cut the gradient of router losses"
        )

    def test_experts_implementation(self):
        assert CoeForCausalLM._can_set_experts_implementation(), (
            "transformers does not find `@use_experts_implementation` in `modeling_coe.py`: experts_implementation "
            "cannot be chosen"
        )
        model = tiny_model()
        model.set_experts_implementation("batched_mm")
        assert model.model.layers[0].mlp.experts.config._experts_implementation == "batched_mm", (
            "tests and backends read the chosen implementation there"
        )
        interface = ExpertsInterface()
        interface["mine"] = lambda self, *_: (self.is_transposed, self.has_bias, self.has_gate, self.is_concatenated)

        @use_experts_implementation(experts_interface=interface)
        class Experts(DeepseekV2Experts):
            def forward(self, *args):
                return "eager"

        config = tiny_config()
        experts = Experts(config)
        config._experts_implementation = "eager"
        assert experts(1) == "eager" and type(experts).forward.__wrapped__(experts, 1) == "eager", (
            "int8 experts have no way to the plain forward of their class"
        )
        config._experts_implementation = "mine"
        assert experts(1) == (False, False, True, True), (
            "experts do not say their layout, by which `megablocks` refuses what it cannot compute"
        )
        gate_up = torch.randn(3, 2 * config.moe_intermediate_size)
        gate, up = gate_up.chunk(2, dim=-1)
        torch.testing.assert_close(
            experts._apply_gate(gate_up),
            nn.functional.silu(gate) * up,
            msg="`_apply_gate` computes something else: so would the eager and megablocks experts",
        )
        assert "megablocks" in ALL_EXPERTS_FUNCTIONS, "megablocks cannot be chosen as an experts implementation"

    def test_attention_implementation(self):
        model = tiny_model()
        model.set_attn_implementation("eager")
        assert model.model.layers[0].self_attn.config._attn_implementation == "eager", (
            "`CoeAttention` cannot tell which attention to compute"
        )
        assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", max) is max, "eager attention is not the model's own"

    def test_continuous_batching(self):
        entries = {name for name in vars(ContinuousMixin) if not is_private(name) and not name.startswith("__")}
        assert entries == {
            "init_continuous_batching",
            "destroy_cached_continuous_batching_manager",
            "continuous_batching_context_manager",
            "generate_batch",
        }, "another way into continuous batching may not refuse latent attention"
        if CACHE != "cache":
            for name in ("sdpa", "flash_attention_2"):
                assert "cache" in inspect.signature(ALL_ATTENTION_FUNCTIONS[name]).parameters, (
                    "attention does not find the paged cache of continuous batching"
                )

    def test_parts_of_deepseek_v2(self):
        config = tiny_config(q_lora_rank=12)
        for parent, names in {
            CoeAttention(config, 0): "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj "
            "o_proj q_lora_rank kv_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim scaling "
            "attention_dropout layer_idx",
            DeepseekV2TopkRouter(config): "weight hidden_dim num_experts topk_method num_group topk_group "
            "routed_scaling_factor",
            DeepseekV2Experts(config): "gate_up_proj down_proj num_experts act_fn",
        }.items():
            missing = [name for name in names.split() if not hasattr(parent, name)]
            assert not missing, f"{type(parent).__name__} has no {missing}, which this project's part is built on"


class TestSaving:
    def test_hooks_of_saving(self):
        model = tiny_model()
        assert CoeForCausalLM._auto_class == "AutoModelForCausalLM"
        assert CoeForCausalLM.is_remote_code() and not DeepseekV2ForCausalLM.is_remote_code(), (
            "saved folders do not carry the code that they need, or FSDP2's code instead"
        )
        assert model.should_save_on_this_rank(True) and not model.should_save_on_this_rank(False), (
            "`save_pretrained` does not know which rank writes: ranks would replace each other's folders"
        )
        assert model.barrier_after_gathered_checkpoint_save(None) is None, (
            "ranks go on before the files of `save_pretrained` are in place"
        )

    def test_code_beside_a_model(self, tmp_path):
        custom_object_save(CoePreTrainedModel, tmp_path)
        assert {"modeling_coe.py", "experts.py", "configuration_coe.py"} <= {
            file.name for file in tmp_path.iterdir()
        }, "`custom_object_save` does not copy a module with its siblings: converted folders lack code"

    def test_files_are_written_by_safetensors(self, tmp_path, monkeypatch):
        written = []
        monkeypatch.setattr(
            modeling_utils, "safe_save_file", lambda tensors, file, **_: written.append(Path(file).name)
        )
        tiny_model().save_pretrained(tmp_path)
        assert written == ["model.safetensors"], "tests cannot let a save fail half-way"

    def test_pushing(self):
        parameters = list(inspect.signature(PreTrainedModel._upload_modified_files).parameters)
        assert parameters[:3] == ["self", "working_dir", "repo_id"], "a pushed model gets an empty model card"

    def test_empty_model_card(self, monkeypatch):
        def load(repo_id, **_):
            raise LocalEntryNotFoundError(repo_id)

        assert issubclass(LocalEntryNotFoundError, EntryNotFoundError)
        monkeypatch.setattr(hub.ModelCard, "load", load)
        card = hub.create_and_tag_model_card("somebody/model")
        assert cards._is_empty_form(card), (
            "transformers' empty model card reads differently: it stays, above the parts of `model_cards`"
        )

    def test_fsdp2_makes_a_class(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            model = fully_shard(tiny_model(), mesh=mesh)
        finally:
            dist.destroy_process_group()
        assert isinstance(model, FSDPModule) and isinstance(model, CoeForCausalLM), (
            "sharded models and experts cannot be told: their weights would be shared after they are gone"
        )
        assert type(model)._model_class() is CoeForCausalLM, "a sharded model is saved without its code"

    def test_strided_shards(self):
        checkpoint = pytest.importorskip(
            "transformers.distributed.checkpoint", reason="5.20 has distributed checkpoints"
        )
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1))
            placements = (_StridedShard(0, split_factor=2), Shard(0))
            own = {"optimizer": {"weight": DTensor.from_local(torch.ones(4), mesh, placements)}, "step": 1}
            state = checkpoint._redistribute_state_dict(own)
            assert state["optimizer"]["weight"].placements == (Shard(0), Shard(0)) and state["step"] == 1, (
                "distributed pre-training saves experts in a wrong order"
            )
            back = checkpoint._redistribute_state_dict(state, reference_state_dict=own)
            assert back["optimizer"]["weight"].placements == placements, (
                "distributed pre-training goes on with experts in a wrong order"
            )
        finally:
            dist.destroy_process_group()

    def test_fsdp1_marks_parameters(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            for marks, use_orig_params in (("_fsdp_flattened", True), ("_is_flat_param", False)):
                wrapped = FullyShardedDataParallel(
                    nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=use_orig_params
                )
                assert all(hasattr(parameter, marks) for parameter in wrapped.module.parameters()), (
                    "parts of weights would be saved under FSDP1 as if they were whole"
                )
        finally:
            dist.destroy_process_group()


class TestTraining:
    def test_trainer(self, tmp_path):
        pytest.importorskip("accelerate")
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Watch(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                self.entry = state.log_history[-1] if state.log_history else None

        model = nn.Linear(2, 2)
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        trainer, watch = Trainer(model=model, args=arguments), Watch()
        trainer.callback_handler.callbacks.insert(0, watch)
        trainer.log({"loss": 1.0})
        assert hasattr(watch, "entry"), "`RoutingCallback.add_to` cannot come before the loggers"
        assert watch.entry and watch.entry["loss"] == 1, "routing statistics do not reach `log_history`"
        assert trainer.accelerator.unwrap_model(trainer.model) is model, "cards cannot be written for wrapped models"
        assert callable(trainer.create_model_card), "`model_cards.attach` cannot complete a trainer's card"

    def test_accelerate_tells_the_device(self):
        state = pytest.importorskip("accelerate.state")
        assert isinstance(state.PartialState._shared_state, dict) and callable(state.AcceleratorState._reset_state), (
            "tests cannot let accelerate's FSDP2 run on the CPU"
        )

    def test_native_plans(self):
        model = tiny_model()
        assert model.init_parallel_plans() is None and model._fsdp_plan["lm_head"], (
            "tied embeddings would be sharded twice by FSDP2, and train wrongly where shards are padded"
        )
        assert list(inspect.signature(PreTrainedModel.maybe_distribute_model).parameters) == [
            *("model", "distributed_config", "mesh_manager")
        ], "nothing is done before FSDP2 shards a model: routers are cast, tied embeddings train wrongly"
        if hasattr(PreTrainedModel, "_resolve_parallel_plans"):  # from 5.23 on
            config = DistributedConfig(fsdp_size=2)
            assert "lm_head" in tiny_model()._resolve_parallel_plans(config)[-1], (
                "routers are sharded twice in a model in half precision, which FSDP2 refuses"
            )

    def test_accelerate_replaces_forward(self):
        hooks = pytest.importorskip("accelerate.hooks")
        linear = nn.Linear(2, 2)
        hooks.add_hook_to_module(linear, hooks.ModelHook())
        assert "forward" in vars(linear), "`CoeAttention` would read an offloaded projection's weight"

    def test_casting_a_module(self):
        calls = []

        class Watched(nn.Linear):
            def _apply(self, *args, **kwargs):
                calls.append(1)
                return super()._apply(*args, **kwargs)

        model = nn.Sequential(Watched(2, 2))
        for cast in (model.half, model.bfloat16, lambda: model.to(torch.float16), model.float):
            cast()
        assert len(calls) == 4, "`_apply` is not asked: selection biases would be cast, and small steps of them lost"

    def test_a_class_tells_its_name(self):
        model = tiny_model()
        assert repr(model).startswith("CoeForCausalLM(") and model._get_name() == "CoeForCausalLM", (
            "`_get_name` is not what names a class: `Trainer` would not shift the labels that it smooths under FSDP2"
        )

    def test_transforms_are_told(self):
        seen = []

        def function(x):
            seen.append(torch._C._are_functorch_transforms_active())
            return x.sum()

        function(torch.ones(2))
        torch.func.grad(function)(torch.ones(2))
        assert seen == [False, True], (
            "transforms of `torch.func` cannot be told: `grouped_mm` experts would raise there"
        )

    def test_assigning_is_told(self):
        seen = []
        module = nn.Linear(2, 2)
        module.register_load_state_dict_pre_hook(
            lambda *args: seen.append(args[3].get("assign_to_params_buffers", False))
        )
        for assign in (False, True):
            module.load_state_dict(nn.Linear(2, 2).state_dict(), assign=assign)
        assert seen == [False, True], "`assign=True` cannot be told: experts would be loaded in the model's dtype"

    def test_hooks_of_a_module(self):
        linear = nn.Linear(2, 2)
        linear.register_forward_hook(lambda *_: None)
        linear.register_forward_pre_hook(lambda *_: None)
        assert len(linear._forward_hooks) == len(linear._forward_pre_hooks) == 1, (
            "`CoeAttention` would not see that a projection does more than multiply"
        )

    def test_backward_passes_have_numbers(self):
        numbers = []
        x = torch.ones(1, requires_grad=True)
        for _ in range(2):
            y = x * 2
            y.register_hook(lambda _: numbers.append(torch._C._current_graph_task_id()))
            (y * 1).sum().backward()
        assert len(set(numbers)) == 2 and torch._C._current_graph_task_id() == -1, (
            "backward passes cannot be told apart: `grouped_mm` experts would add up gradients of a broken-off one"
        )

    def test_onednn(self):
        if not torch.backends.mkldnn.is_available():
            pytest.skip("torch is built without oneDNN")
        a, b = torch.randn(16, 32), torch.randn(8, 32)
        torch.testing.assert_close(
            torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
            a @ b.T,
            msg="oneDNN's product is another: `grouped_mm` experts are wrong on processors that are not Intel's",
        )

    def test_what_only_tests_use_of_torch(self):
        with TorchDispatchMode():
            assert torch.utils._pytree.tree_map(lambda x: x + 1, {"a": [1]}) == {"a": [2]}
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 0, "tests cannot count compiled graphs"


class TestPeft:
    def test_wrapper_of_a_parameter(self):
        """`sharing_weights` steps aside where one of these is missing: right, and slower."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
        )
        model = peft.get_peft_model(tiny_model(), config)
        wrapper = model.get_base_model().model.layers[0].mlp.experts
        plain = wrapper.base_layer.down_proj.detach().clone()
        assert not wrapper.merged and not wrapper.disable_adapters and wrapper.active_adapters == ["default"]
        with wrapper._activate_lora(wrapper.active_adapters):
            assert not torch.equal(wrapper.base_layer.down_proj, plain), (
                "`_activate_lora` adds no adapter: adapters of experts would have no effect"
            )
            merged = wrapper.merged_adapters
            wrapper.merged_adapters = wrapper.active_adapters
            assert wrapper.merged, "`merged` is not what `merged_adapters` says: adapters would be added twice"
            wrapper.merged_adapters = merged
        assert torch.equal(wrapper.base_layer.down_proj, plain), "`_activate_lora` leaves adapters in the weights"

    def test_factors_of_an_adapter(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
            r=3,
        )
        model = peft.get_peft_model(tiny_model(), config)
        outer = model.get_base_model().model.layers[0].mlp.experts
        wrappers = (outer, outer.base_layer)
        assert {wrapper.parameter_name for wrapper in wrappers} == {"gate_up_proj", "down_proj"}, (
            "wrappers do not say what they adapt: adapters of experts are added to all weights, which is slow"
        )
        for wrapper in wrappers:
            ((name, (a, b)),) = low_rank_factors(wrapper.get_base_layer(), [wrapper]).items()
            torch.testing.assert_close(
                b @ a,
                wrapper.get_delta_weight("default"),
                msg=f"PEFT lays `lora_A` and `lora_B` of `{name}` out in another way: rows of experts are multiplied "
                "by factors of other experts",
            )
            assert obstacle(wrapper.get_base_layer(), [wrapper]) is None, "adapters are added to all weights"

    def test_grouped_products(self):
        rows, weight = torch.randn(5, 8), torch.randn(3, 4, 8)
        expected = torch.cat([rows[:2] @ weight[0].T, rows[2:] @ weight[2].T])
        torch.testing.assert_close(
            _grouped_linear(rows, weight, torch.tensor([2, 2, 5], dtype=torch.int32)),
            expected,
            msg="`_grouped_linear` computes something else: so do adapted experts on other devices than the CPU",
        )


class TestMegablocks:
    def test_kernels(self):
        kernels = pytest.importorskip("stk.backend.triton_kernels")
        for function, arguments in {
            kernels.sdd: "lhs rhs shape out offsets row_indices column_indices",
            kernels.dsd: "shape data offsets row_indices column_indices offsets_t column_indices_t block_offsets_t "
            "transpose_a rhs out",
        }.items():
            assert list(inspect.signature(function).parameters) == arguments.split(), (
                f"stk's `{function.__name__}` takes other arguments: `megablocks` would compute something else"
            )
        for kernel in (kernels._sdd_kernel, kernels._dsd_kernel):
            assert kernel.configs and all(isinstance(config.kwargs, dict) for config in kernel.configs), (
                "kernels' launch options cannot be set: float32 products would use TF32"
            )
            expected = "JITFunction" if torch.cuda.is_available() else "InterpretedFunction"
            assert type(kernel.fn).__name__ == expected, (
                "Triton's interpreter cannot be told from its compiler: bfloat16 products would be wrong on the CPU"
            )

    def test_launch_option(self):
        pytest.importorskip("triton")
        compiler = importlib.import_module("triton.backends.nvidia.compiler")
        assert "ieee" in compiler.CUDAOptions().allowed_dot_input_precisions, (
            "Triton has no such launch option: float32 products would fail, or use TF32"
        )


class TestPackedProducts:
    """Where one is missing, matrices are widened instead: `cpu_kernels.py` says so."""

    def test_8_bits(self):
        rows, weight = torch.randn(3, 32, dtype=torch.bfloat16), torch.randint(-127, 128, (16, 32), dtype=torch.int8)
        product = torch._weight_int8pack_mm(rows, weight, torch.ones(16, dtype=torch.bfloat16))
        assert (product.double() - rows.double() @ weight.double().T).abs().max() < 0.01 * 127 * 32, (
            "decoding with 8-bit weights on the CPU would take as long as with float32"
        )

    def test_4_bits(self):
        rows, weight = torch.randn(3, 32, dtype=torch.bfloat16), torch.randint(0, 16, (16, 32))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.int(), 1)
        scale_and_zero = torch.tensor([2.0, 1.0], dtype=torch.bfloat16).expand(1, 16, 2).contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, 32, scale_and_zero)
        assert packed.shape == (16, 16) and packed.dtype == torch.uint8
        assert (product.double() - rows.double() @ (2.0 * (weight - 8) + 1).double().T).abs().max() < 0.01 * 16 * 32, (
            "4-bit weights on the CPU would be widened, or stand for other numbers"
        )


class TestTorchAo:
    def test_tensors(self):
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        linear = nn.Linear(32, 16)
        quantize_(linear, Int8WeightOnlyConfig())
        data = linear.weight.data
        assert type(linear.weight).__module__.startswith("torchao."), (
            "int8 experts would be multiplied as a group, which their tensors do not support"
        )
        assert type(data).__module__.partition(".")[0] == "torchao", "reports do not see that a weight is quantised"
        names, _ = data.__tensor_flatten__()
        assert torch.int8 in {getattr(data, name).dtype for name in names}, "reports count the bytes of other weights"

    @pytest.mark.parametrize("bits", [8, 4])
    def test_parts_of_tensors(self, bits):
        """What `quantized_weights.py` reads, under the names that it reads."""
        torchao = pytest.importorskip("torchao.quantization")
        from modeling_coe import quantized_weights

        reason = "the CPU would multiply quantised weights as torchao does, several times slower"
        assert quantized_weights.Int8Tensor is torchao.Int8Tensor, reason
        assert quantized_weights.Int4Tensor is torchao.Int4Tensor, reason
        assert issubclass(torchao.Int8Tensor, quantized_weights.TorchAOBaseTensor), reason
        assert issubclass(torchao.Int4Tensor, quantized_weights.TorchAOBaseTensor), reason
        if bits == 8:
            linear = nn.Linear(64, 48, bias=False)
            torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
            weight = linear.weight
            assert weight.qdata.shape == (48, 64) and weight.qdata.dtype == torch.int8, reason
            assert weight.scale.shape == (48, 1) and not weight.zero_point.any(), reason
            assert weight.act_quant_kwargs is weight.act_pre_scale is None, reason
            torch.testing.assert_close(weight.dequantize(), weight.qdata * weight.scale, msg=reason)
            by_row = torchao.Int8Tensor.from_hp(nn.Linear(64, 48).weight.detach(), torchao.PerRow())
            assert by_row.scale.shape == (48, 1), "weights that do not fit groups of 4 bits would not be quantised"
        else:
            shapes = (48, 32), (2, 48), (2, 48)
            dtypes = torch.uint8, torch.bfloat16, torch.bfloat16
            parts = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
            weight = torchao.Int4Tensor(*parts, [1, 32], torch.Size((48, 64)))
            assert weight.shape == (48, 64) and weight.act_pre_scale is None, reason
            assert all(getattr(weight, n) is p for n, p in zip(("qdata", "scale", "zero_point"), parts, strict=True))

    def test_a_tensor_of_our_own(self):
        pytest.importorskip("torchao")
        from modeling_coe.quantized_weights import PackedInt4Tensor

        assert callable(torch.Tensor._make_wrapper_subclass), "weights could not be kept in 4 bits"
        data = torch.zeros(16, 16, dtype=torch.uint8), torch.zeros(1, 16, 2, dtype=torch.bfloat16)
        parameter = nn.Parameter(PackedInt4Tensor(*data), requires_grad=False)
        assert type(parameter) is PackedInt4Tensor, "parameters lose their parts"
        assert parameter.qdata.data_ptr() == data[0].data_ptr(), "parameters are copies"
        assert type(parameter.detach().clone()) is PackedInt4Tensor, "weights of 4 bits could not be copied or saved"

    def test_recipes(self):
        """Quantising to 4 bits by a recipe of our own under the name of torchao's."""
        pytest.importorskip("torchao")
        from torchao.core.config import AOBaseConfig
        from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig
        from torchao.quantization.transform_module import register_quantize_module_handler

        reason = "`int4_weight_only` cannot quantise without torchao's library for GPUs"
        assert issubclass(Int4WeightOnlyConfig, AOBaseConfig) and callable(register_quantize_module_handler), reason
        recipe = FqnToConfig({"weight": Int4WeightOnlyConfig(group_size=32)})
        assert recipe.fqn_to_config == recipe.module_fqn_to_config, reason

    def test_experts_are_found_by_name(self):
        pytest.importorskip("torchao")
        from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

        experts = CoeExperts(tiny_config())
        quantize_(experts, FqnToConfig({r"re:.*down_proj": Int8WeightOnlyConfig()}), filter_fn=None)
        assert type(experts.down_proj).__module__.startswith("torchao."), "routed experts would not be quantised"


class TestHub:
    def test_validators(self):
        @strict
        @dataclass
        class Config:
            width: int = 1

            def validate_width(self):
                if self.width < 1:
                    raise ValueError("no width")

        try:
            config = Config(width=0)
        except (ValueError, StrictDataclassError):
            config = None
        assert config is None, "`validate_...` methods are not called: a wrong `CoeConfig` is made without an error"

    def test_metadata_of_cards(self):
        result = EvalResult("text-generation", "gsm8k", "gsm8k", "loss", 1.0)
        other = EvalResult("text-generation", "gsm8k", "gsm8k", "loss", 2.0)
        assert result.is_equal_except_value(other), "a repeated measurement would be in a card twice"
        card = ModelCard("---\nlicense: mit\n---\n# Mine\n")
        card.data["tags"] = ["one"]
        assert card.data.get("license") == "mit" and "tags:\n- one" in str(card), "cards cannot be completed"
        assert card.text.strip() == "# Mine", "the parts of a card cannot be replaced"


class TestLmEval:
    """What only tests use: they index fewer tasks, and compare how a prompt and its answer are tokenised."""

    def test_index_and_tokens(self):
        pytest.importorskip("lm_eval")
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks._index import TaskIndex

        assert list(inspect.signature(TaskIndex._iter_yaml_files).parameters) == ["root"], (
            "tests of examples/evaluation.py would index thousands of tasks"
        )
        assert list(inspect.signature(HFLM._encode_pair).parameters) == ["self", "context", "continuation"], (
            "what lm-eval scores cannot be compared with what training learns"
        )
