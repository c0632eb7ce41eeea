"""What users expect of a causal language model in transformers, beyond loading and generating."""

import copy
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV2Model

from configuration_coe import BACKBONES, RESIDUAL_RULES
from modeling_coe import (
    CoeForCausalLM,
    CoeForQuestionAnswering,
    CoeForSequenceClassification,
    CoeForTokenClassification,
    CoeModel,
)

from .helpers import (
    EXPERTS_BACKENDS,
    ROOT,
    TINY,
    assert_equal_up_to_rounding,
    random_ids,
    tiny_config,
    tiny_model,
)


ALL_CLASSES = (
    CoeModel,
    CoeForCausalLM,
    CoeForSequenceClassification,
    CoeForTokenClassification,
    CoeForQuestionAnswering,
)


@pytest.fixture(params=ALL_CLASSES, ids=lambda model_class: model_class.__name__)
def any_model(request):
    return request.param(tiny_config()).eval()


def some_loss(model, input_ids):
    if isinstance(model, CoeModel):
        return model(input_ids).last_hidden_state.square().mean()
    batch, length = input_ids.shape
    labels = {
        CoeForCausalLM: {"labels": input_ids},
        CoeForSequenceClassification: {"labels": torch.arange(batch) % 2},
        CoeForTokenClassification: {"labels": input_ids % 2},
        CoeForQuestionAnswering: {
            "start_positions": torch.zeros(batch).long(),
            "end_positions": torch.full((batch,), length - 1),
        },
    }[type(model)]
    return model(input_ids, **labels).loss


def test_every_class_trains(any_model):
    loss = some_loss(any_model.train(), random_ids(2, 7))
    loss.backward()
    without = [name for name, parameter in any_model.named_parameters() if parameter.grad is None]
    assert not without
    assert torch.isfinite(loss)


def test_hidden_states_and_attentions(any_model):
    any_model.set_attn_implementation("eager")
    config = any_model.config
    outputs = any_model(random_ids(2, 7), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 7, 32)] * (config.num_hidden_layers + 1)
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, 7, 7)] * config.num_hidden_layers
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 4, 7))


def test_tuple_and_dictionary_outputs_agree(any_model):
    input_ids = random_ids(2, 7)
    with torch.no_grad():
        as_dictionary = any_model(input_ids, output_hidden_states=True)
        as_tuple = any_model(input_ids, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for one, other in zip(as_tuple, as_dictionary.to_tuple(), strict=True):
        if isinstance(one, torch.Tensor):
            assert_equal_up_to_rounding(one, other)


def test_inputs_embeds(any_model):
    input_ids = random_ids(1, 7)
    embeddings = any_model.get_input_embeddings()(input_ids)
    with torch.no_grad():
        assert_equal_up_to_rounding(any_model(inputs_embeds=embeddings)[0], any_model(input_ids)[0])
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        any_model(input_ids, inputs_embeds=embeddings)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    input_ids = random_ids(2, 7)
    with torch.no_grad():
        before = model(input_ids).logits
        model.resize_token_embeddings(120)
        after = model(input_ids).logits
    assert after.shape[-1] == model.config.vocab_size == 120
    assert_equal_up_to_rounding(after[..., :99], before)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_equal_up_to_rounding(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, after)


@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_attention_backends_agree(q_lora_rank):
    model = tiny_model(q_lora_rank=q_lora_rank)
    input_ids = random_ids(2, 9)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    logits = {}
    for attention in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits[attention] = model(input_ids, attention_mask=mask).logits[mask.bool()]
    assert_equal_up_to_rounding(logits["sdpa"], logits["eager"])
    assert_equal_up_to_rounding(logits["flex_attention"], logits["eager"])


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
def test_experts_backends_agree(rule):
    model = tiny_model(**RESIDUAL_RULES[rule]).train()
    input_ids = random_ids(2, 9)
    results = {}
    for backend in EXPERTS_BACKENDS:
        model.set_experts_implementation(backend)
        model.zero_grad()
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        results[backend] = [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
    for backend in EXPERTS_BACKENDS[1:]:
        for actual, expected in zip(results[backend], results["eager"], strict=True):
            assert_equal_up_to_rounding(actual, expected)


@pytest.mark.parametrize("backend", EXPERTS_BACKENDS)
def test_training_is_deterministic(backend):
    gradients, threads = [], torch.get_num_threads()
    if backend == "batched_mm":  # torch's threads add up the gradients of weights that were gathered in any order
        torch.set_num_threads(1)
    for _ in range(2):
        model = tiny_model().train()
        model.set_experts_implementation(backend)
        input_ids = random_ids(2, 9)
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = tiny_model()
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        expected = model(input_ids, output_router_logits=True)
        half = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
        half.load_state_dict(model.state_dict())
        logits = half(input_ids, output_router_logits=True)
    assert logits.logits.dtype == dtype
    assert all(router.dtype == torch.float32 for router in logits.router_logits)
    # Loose: one swapped expert moves a logit by more than rounding does.
    assert (logits.logits.float() - expected.logits).abs().median() < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(input_ids, labels=input_ids, output_router_logits=True)
    output.loss.backward()
    assert all(router.dtype == torch.float32 for router in output.router_logits)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
def test_torch_export(backend):
    model = tiny_model()
    model.set_experts_implementation(backend)
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": input_ids, "use_cache": False}, strict=False)
        exported = program.module()(input_ids=input_ids, use_cache=False)
        assert_equal_up_to_rounding(exported.logits, model(input_ids).logits)


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
def test_device_map_offloads_to_disk(tmp_path, rule):
    model = chain_that_talks(rule)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    device_map |= {"model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    input_ids = random_ids(2, 7)
    with torch.no_grad():
        assert_equal_up_to_rounding(offloaded(input_ids).logits, model(input_ids).logits)
    assert model._no_split_modules == {"CoeDecoderLayer"}


def chain_that_talks(rule: str, **overrides) -> CoeForCausalLM:
    """A tiny model of a residual rule, of which a converted chain has scales that are not zero."""
    model = tiny_model(**RESIDUAL_RULES[rule], norm_topk_prob=True, **overrides)
    for name, parameter in model.named_parameters():
        if "iteration_scale" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def copied(value):
    """As who moves the arguments of a module to its device, casts them or gathers its weights passes them on."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
@pytest.mark.parametrize("training", [False, True])
def test_no_module_writes_into_its_arguments(rule, training):
    """Each computes the same when it gets copies of them, and its caller a copy of what it returns."""
    model = chain_that_talks(rule, aux_loss_alpha=0.1).train(training)
    input_ids = random_ids(2, 9)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        output = model(input_ids, labels=input_ids, use_cache=False)
        output.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        return output.logits, gradients

    expected = run()
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, args, kwargs: copied((args, kwargs)), with_kwargs=True)
        module.register_forward_hook(lambda _, args, output: copied(output))
    logits, gradients = run()
    assert_equal_up_to_rounding(logits, expected[0])
    for actual, wanted in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rule", ["inner", "split"])
def test_hooks_of_accelerate_on_every_module(rule):
    hooks = pytest.importorskip("accelerate.hooks")
    model = chain_that_talks(rule)
    hooked = copy.deepcopy(model)
    for module in hooked.modules():
        if module is not hooked:
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        assert_equal_up_to_rounding(hooked(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("rule", ["inner", "refine", "split"])
@pytest.mark.parametrize("units", ["layer", "mlp", "experts", "mlp and experts", "base"])
@pytest.mark.parametrize("param_dtype", [None, torch.float32], ids=["as it is", "mixed precision"])
def test_units_of_fsdp2(rule, units, param_dtype):
    """Sharding changes no loss, balancing included, and no gradient, whatever its units are. (One process: parameters
    are gathered and released, and arguments cast, as among many.)"""
    model = chain_that_talks(rule, aux_loss_alpha=0.5).train()
    input_ids = random_ids(2, 9)
    expected = model(input_ids, labels=input_ids)
    expected.loss.backward()
    sharded = chain_that_talks(rule, aux_loss_alpha=0.5).train()
    sharded.load_state_dict(model.state_dict())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=param_dtype)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in sharded.model.layers:
            modules = {"layer": [layer], "mlp": [layer.mlp], "experts": [layer.mlp.experts], "base": []}
            modules["mlp and experts"] = [layer.mlp.experts, layer.mlp]
            for module in modules[units]:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(sharded.model if units == "base" else sharded, mesh=mesh, mp_policy=policy)
        output = sharded(input_ids, labels=input_ids)
        assert output.aux_loss is not None
        torch.testing.assert_close(output.loss, expected.loss, atol=1e-4, rtol=0)
        output.loss.backward()
        for (name, parameter), wanted in zip(sharded.named_parameters(), model.parameters(), strict=True):
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            torch.testing.assert_close(gradient, wanted.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    finally:
        dist.destroy_process_group()


UNPICKLE = """
import pickle, sys, torch
model, input_ids = pickle.load(sys.stdin.buffer)
output = model(input_ids, labels=input_ids, output_router_logits=True)
pickle.dump((output.loss, output.logits, len(output.router_logits)), sys.stdout.buffer)
"""


@pytest.mark.parametrize("backbone", ["deepseek_v2", "qwen3_moe"])
@pytest.mark.parametrize("history", ["fresh", "trained", "loaded", "unpickled", "adapted"])
def test_pickled_into_another_process(history, backbone, tmp_path):
    """What `spawn`, some launchers and `torch.save(model)` do. The routers are recorded, and balanced, there too."""
    model = tiny_model(aux_loss_alpha=0.5, backbone=backbone).train()
    input_ids = random_ids(2, 9)
    if history == "trained":
        model(input_ids, labels=input_ids, output_hidden_states=True).loss.backward()
    elif history == "loaded":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    elif history == "unpickled":
        model = pickle.loads(pickle.dumps(model))
    elif history == "adapted":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).train()
    run = subprocess.run(
        [sys.executable, "-c", UNPICKLE],
        input=pickle.dumps((model, input_ids)),
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    loss, logits, num_calls = pickle.loads(run.stdout)
    expected = model(input_ids, labels=input_ids)
    assert expected.aux_loss is not None and num_calls == 4
    assert_equal_up_to_rounding(logits, expected.logits)
    torch.testing.assert_close(loss, expected.loss, atol=1e-4, rtol=0)


def test_a_saved_model_object(tmp_path):
    model = tiny_model()
    seen = []
    torch.save(model, tmp_path / "model.pt")
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model(random_ids(1, 3))
    assert seen == [1], "pickling leaves the model's own hooks"
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    input_ids = random_ids(1, 5)
    with torch.no_grad():
        output = again(input_ids, output_router_logits=True, output_hidden_states=True)
        assert_equal_up_to_rounding(output.logits, model(input_ids).logits)
    assert len(output.router_logits) == 4 and len(output.hidden_states) == 3


@pytest.mark.parametrize("experts", ["grouped_mm", "torch_grouped_mm", "batched_mm"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_computes_other_inputs(experts):
    """As exporters trace it: with other lengths, and tokens that choose other experts."""
    model = tiny_model()
    model.set_experts_implementation(experts)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, use_cache=False).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits().eval(), random_ids(2, 10), check_trace=False)
        for shape in ((1, 7), (3, 20), (2, 1)):
            input_ids = random_ids(*shape)
            assert_equal_up_to_rounding(traced(input_ids), model(input_ids).logits)


def test_transforms_of_torch_func():
    """Gradients of each sequence, with the default experts."""
    model = tiny_model(aux_loss_alpha=0.1).train()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    input_ids = random_ids(3, 8)

    def loss(parameters, sequence):
        arguments = {"labels": sequence[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (sequence[None],), arguments).loss

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, input_ids)
    for i, sequence in enumerate(input_ids):
        model.zero_grad()
        model(sequence[None], labels=sequence[None]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][i], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"q_lora_rank": 8},
        {"n_shared_experts": None},
        {"first_k_dense_replace": 1},
        {"n_routed_experts": None},
        {"use_igate": False, "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_parallel_plans_name_what_the_model_has(backbone, fields):
    """All of it and nothing else: every projection that the families' plans split is in the plan."""
    model = tiny_model(backbone=backbone, **fields).model
    config, names = model.config, set()
    for name, _ in (*model.named_modules(), *model.named_parameters()):
        names.add(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    assert set(config.base_model_tp_plan) <= names and set(config.base_model_ep_plan) <= names
    assert set(config.base_model_pp_plan) <= {name for name, _ in model.named_children()}
    own = set(BACKBONES[backbone].config_class.base_model_tp_plan or {})  # some have none in older releases
    known = own | set(DeepseekV2Config.base_model_tp_plan)
    other = {name for name in known if ".self_attn." in name} - own
    assert (known - other) & names <= set(config.base_model_tp_plan)
    experts = {f"layers.*.mlp.experts{name}" for name in ("", ".gate_up_proj", ".down_proj")}
    for plan in (config.base_model_tp_plan, config.base_model_ep_plan):
        assert experts & set(plan) == (experts if config.num_sparse_layers else set())
        assert plan is not DeepseekV2Config.base_model_tp_plan and plan is not DeepseekV2Config.base_model_ep_plan
    # Whether embeddings are split over the vocabulary differs between releases.
    options = {**TINY, "n_group": 1, "topk_group": 1, "tie_word_embeddings": config.tie_word_embeddings}
    native = DeepseekV2Model(DeepseekV2Config(**options))
    assert model.tp_plan.get("embed_tokens") == native.tp_plan.get("embed_tokens")


def test_outputs_are_pytrees():
    """As FSDP, DDP and export take them apart and put them together."""
    model = tiny_model().train()
    input_ids = random_ids(1, 6)
    for output in (
        model(input_ids, labels=input_ids, output_router_logits=True),
        model.model(input_ids, output_router_logits=True, output_router_indices=True),
    ):
        again = torch.utils._pytree.tree_map(lambda leaf: leaf, output)
        assert type(again) is type(output)
        assert again.keys() == output.keys()
        assert len(output.router_indices) == 4


def test_a_copy_is_independent():
    """The recording hooks of a model see that model alone."""
    model = tiny_model()
    twin = copy.deepcopy(model)
    input_ids = random_ids(1, 6)
    with torch.no_grad():
        twin.model.layers[0].mlp.gate[0].weight.zero_()
        one, other = (m(input_ids, output_router_logits=True).router_logits for m in (model, twin))
    assert len(one) == len(other) == 4
    assert not other[0].any()
    assert one[0].any()
