"""`lora_config`: what an adapter reaches, how large it is, and its way to disk, into the weights and out again."""

import contextlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from modeling_coe import CoeConfig, CoeForSequenceClassification
from modeling_coe.adapters import obstacle
from modeling_coe.experts import sharing_weights
from modeling_coe.lora import lora_config
from modeling_coe.modeling_coe import CoeExperts

from . import naive
from .helpers import (
    EXPERTS_BACKENDS,
    ROOT,
    assert_equal_up_to_rounding,
    enable_checkpointing,
    random_ids,
    tiny_config,
    tiny_model,
)


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("error:.*rank_pattern:RuntimeWarning")

ParamWrapper = peft.tuners.lora.layer.ParamWrapper
GROUPED_QUERIES = {"num_key_value_heads": 2, "head_dim": 16}
BACKBONES = {
    "deepseek_v2": {},
    "deepseek_v3": {"q_lora_rank": 12},
    "qwen2_moe": {**GROUPED_QUERIES, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**GROUPED_QUERIES, "n_shared_experts": 0},
    "olmoe": {"num_key_value_heads": 2, "n_shared_experts": None},
    "mixtral": {**GROUPED_QUERIES, "n_shared_experts": 0},
    "llama": GROUPED_QUERIES,
    "qwen3": GROUPED_QUERIES,
    "glm4_moe": {**GROUPED_QUERIES, "use_qk_norm": True},
    "minimax_m2": {**GROUPED_QUERIES, "n_shared_experts": 0},
}
EVERYTHING = {"attention": True, "experts": True, "routers": True, "shared_experts": True}
NOTHING = dict.fromkeys(EVERYTHING, False)


def adapted(overrides: dict | None = None, seed: int = 0, **options):
    """A tiny model whose first layer is dense, with an adapter that is not zero."""
    model = tiny_model(**{"num_hidden_layers": 3, "first_k_dense_replace": 1, **(overrides or {})})
    options = {"r": 3, "init_lora_weights": False, **options}
    torch.manual_seed(seed + 7)
    return peft.get_peft_model(model, lora_config(model, **options))


def attention_shapes(config: CoeConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every projection of one attention."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.backbone not in ("deepseek_v2", "deepseek_v3"):
        query, key = heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden), "o_proj": (hidden, query)}
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    shapes = {
        "kv_a_proj_with_mqa": (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj": (hidden, heads * config.v_head_dim),
    }
    if config.q_lora_rank is None:
        return {**shapes, "q_proj": (query, hidden)}
    return {**shapes, "q_a_proj": (config.q_lora_rank, hidden), "q_b_proj": (query, config.q_lora_rank)}


def expected_parameters(config: CoeConfig, r: int, expert_r: int, routers: bool = False) -> dict[str, int]:
    """Parameters of the adapters by what they are on, counted by hand: rank * (in + out) for every matrix."""
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    sparse = config.num_hidden_layers - config.first_k_dense_replace
    counts = {"self_attn": config.num_hidden_layers * r * sum(o + i for o, i in attention_shapes(config).values())}
    counts["experts"] = sparse * experts * expert_r * ((2 * width + hidden) + (hidden + width))
    if config.n_shared_experts:
        shared = config.shared_expert_intermediate_size or config.n_shared_experts * width
        counts["shared_experts"] = sparse * r * 3 * (hidden + shared)
    if routers:
        counts["gate"] = sparse * (config.inner_iter if config.use_igate else 1) * r * (hidden + experts)
    return counts


def trainable_parameters(model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")  # base_model.model.model.layers.0.self_attn... or ...layers.1.mlp.gate...
            kind = parts[5] if parts[5] == "self_attn" else parts[6]
            counts[kind] = counts.get(kind, 0) + parameter.numel()
    return counts


@pytest.mark.parametrize(
    ("backbone", "use_igate"), [*((backbone, True) for backbone in BACKBONES), ("deepseek_v2", False)]
)
def test_reaches_what_it_says_and_nothing_else(backbone, use_igate):
    overrides = {"backbone": backbone, **BACKBONES[backbone], "use_igate": use_igate, "inner_iter": 3}
    model = adapted(overrides, **EVERYTHING).train()
    config = model.get_base_model().config
    assert trainable_parameters(model) == expected_parameters(config, r=3, expert_r=3, routers=True)
    input_ids = random_ids(2, 24)
    model(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.any(), name


@pytest.mark.parametrize("kind", EVERYTHING)
def test_each_part_alone(kind):
    model = adapted(**{**NOTHING, kind: True})
    name = {"attention": "self_attn", "routers": "gate"}.get(kind, kind)
    expected = expected_parameters(model.get_base_model().config, r=3, expert_r=3, routers=True)
    assert trainable_parameters(model) == {name: expected[name]}


def test_a_new_adapter_changes_nothing():
    model = adapted(**EVERYTHING, init_lora_weights=True).eval()
    input_ids = random_ids(2, 9)
    expected = tiny_model(num_hidden_layers=3, first_k_dense_replace=1)(input_ids).logits
    assert_equal_up_to_rounding(model(input_ids).logits, expected)


class TestIterationScales:
    """A converted chain begins to communicate in low-rank tuning too: its scales of zero are trained as a whole."""

    def base(self, **overrides):
        return tiny_model(num_hidden_layers=3, first_k_dense_replace=1, norm_topk_prob=True, **overrides)

    def trained(self, base, config, steps: int = 5):
        model = peft.get_peft_model(base, config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(3)
        input_ids = random_ids(2, 12)
        for _ in range(steps):
            model(input_ids, labels=input_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    @staticmethod
    def scales(model) -> list[torch.Tensor]:
        return [p.detach() for n, p in model.named_parameters() if re.search(r"iteration_scale\b(?!.*lora_)", n)]

    @pytest.mark.parametrize("upcycling", ["refine", "split"])
    @pytest.mark.parametrize("experts", [False, True])
    def test_move_and_are_kept(self, tmp_path, upcycling, experts):
        base = self.base(upcycling=upcycling)
        model = self.trained(base, lora_config(base, experts=experts, r=2))
        input_ids = random_ids(2, 9)
        with torch.no_grad():
            expected = model(input_ids).logits
            with model.disable_adapter():
                assert_equal_up_to_rounding(model(input_ids).logits, self.base(upcycling=upcycling)(input_ids).logits)
            model.save_pretrained(tmp_path)
            saved = load_file(tmp_path / "adapter_model.safetensors")
            assert sum("iteration_scale" in name for name in saved) == 2
            again = peft.PeftModel.from_pretrained(self.base(upcycling=upcycling), tmp_path).eval()
            assert_equal_up_to_rounding(again(input_ids).logits, expected)
            merged = again.merge_and_unload()
            assert_equal_up_to_rounding(merged(input_ids).logits, expected)
            assert [name for name, _ in merged.named_parameters()] == [
                n for n, _ in self.base(upcycling=upcycling).named_parameters()
            ]
            assert len(self.scales(merged)) == 2 and all(scale.abs().max() > 1e-3 for scale in self.scales(merged))
            # What the iterations say to each other is part of the function.
            for scale in self.scales(merged):
                scale.zero_()
            assert (merged(input_ids).logits - expected).abs().max() > 1e-3

    def test_switch_with_their_adapter(self, tmp_path):
        for name, steps in (("first", 3), ("second", 6)):
            base = self.base(upcycling="refine")
            self.trained(base, lora_config(base, r=2), steps).save_pretrained(tmp_path / name)
        input_ids = random_ids(2, 9)
        both = peft.PeftModel.from_pretrained(self.base(upcycling="refine"), tmp_path / "first", adapter_name="first")
        both.load_adapter(tmp_path / "second", "second")
        for name in ("second", "first"):
            both.set_adapter(name)
            alone = peft.PeftModel.from_pretrained(self.base(upcycling="refine"), tmp_path / name)
            with torch.no_grad():
                assert_equal_up_to_rounding(both.eval()(input_ids).logits, alone.eval()(input_ids).logits)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_by_the_options_of_peft_alone(self, dtype):
        """As whoever writes a `LoraConfig` of their own would name them."""
        base = self.base(upcycling="refine").to(dtype)
        config = peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["iteration_scale"], r=2)
        model = self.trained(base, config)
        assert model(random_ids(1, 5)).logits.dtype == dtype
        assert all(scale.abs().max() > 1e-3 for scale in self.scales(model.merge_and_unload()))

    def test_are_left_out_on_demand_and_where_there_are_none(self):
        for config in (
            tiny_config(),
            tiny_config(prenorm_residual=True),
            tiny_config(upcycling="split", chain_layers=[]),
        ):
            assert lora_config(config).modules_to_save is None
        assert lora_config(tiny_config(upcycling="split"), iteration_scales=False).modules_to_save is None
        both = lora_config(tiny_config(upcycling="split"), modules_to_save=["lm_head"]).modules_to_save
        assert set(both) == {"lm_head", "iteration_scale"}

    def test_under_checkpointing(self):
        base = self.base(upcycling="split")
        enable_checkpointing(base, {"use_reentrant": False})
        model = self.trained(base, lora_config(base, r=2))
        assert all(scale.abs().max() > 1e-3 for scale in self.scales(model.merge_and_unload()))


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 32}, {"lora_alpha": 32, "use_rslora": True}])
def test_a_rank_for_the_experts(tmp_path, options):
    model = adapted(r=6, expert_r=2, routers=True, **options)
    expected = expected_parameters(model.get_base_model().config, r=6, expert_r=2, routers=True)
    assert trainable_parameters(model) == expected
    alpha = options.get("lora_alpha", 8)
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        if "use_rslora" in options:
            assert layer.scaling["default"] == pytest.approx(alpha / layer.r["default"] ** 0.5)
        else:  # as large a step for the experts as for the others
            assert layer.scaling["default"] == pytest.approx(alpha / 6)
    assert {layer.r["default"] for layer in layers} == {2, 6}
    assert_survives_disk(model, tmp_path)


def test_the_experts_alone_have_their_rank_without_patterns():
    config = lora_config(tiny_config(), attention=False, shared_experts=False, r=16, expert_r=2)
    assert config.r == 2 and config.lora_alpha == 1
    assert not config.rank_pattern and not config.alpha_pattern


def assert_survives_disk(model, folder: Path) -> None:
    input_ids = random_ids(2, 9)
    model.save_pretrained(folder / "adapter")
    base = tiny_model(num_hidden_layers=3, first_k_dense_replace=1)
    loaded = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():  # so large an adapter makes more of rounding, and of its scale far more
        torch.testing.assert_close(loaded(input_ids).logits, model.eval()(input_ids).logits, atol=1e-2, rtol=0)


FRESH_PROCESS = """
import sys, torch, modeling_coe
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM

for folder in map(Path, sys.argv[1:]):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    input_ids = torch.load(folder / "input_ids.pt")
    with torch.no_grad():
        plain = base.eval()(input_ids).logits
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
        torch.save({"plain": plain, "adapted": model(input_ids).logits}, folder / "logits.pt")
"""


@torch.no_grad()
def test_a_fresh_process_computes_the_same(tmp_path):
    input_ids = random_ids(2, 9)
    models = {}
    for use_igate in (True, False):
        folder = tmp_path / str(use_igate)
        models[folder] = adapted({"use_igate": use_igate}, **EVERYTHING, expert_r=2).eval()
        models[folder].save_pretrained(folder / "adapter")
        tiny_model(num_hidden_layers=3, first_k_dense_replace=1, use_igate=use_igate).save_pretrained(folder / "base")
        torch.save(input_ids, folder / "input_ids.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *models], env=environment, check=True)
    for folder, model in models.items():
        logits = torch.load(folder / "logits.pt")
        assert_equal_up_to_rounding(logits["adapted"], model(input_ids).logits)
        with model.disable_adapter():
            assert_equal_up_to_rounding(logits["plain"], model(input_ids).logits)
        assert (logits["adapted"] - logits["plain"]).abs().max() > 0.1


@pytest.mark.parametrize("use_igate", [True, False])
@torch.no_grad()
def test_merge_and_unload(use_igate):
    overrides = {"use_igate": use_igate, "initializer_range": 0.05}
    model = adapted(overrides, **EVERYTHING).eval()
    input_ids = random_ids(2, 9)
    expected = model(input_ids).logits
    plain = tiny_model(num_hidden_layers=3, first_k_dense_replace=1, **overrides)
    assert (plain(input_ids).logits - expected).abs().max() > 0.1

    model.merge_adapter()
    assert_equal_up_to_rounding(model(input_ids).logits, expected)
    model.unmerge_adapter()
    assert_equal_up_to_rounding(model(input_ids).logits, expected)

    merged = model.merge_and_unload()
    assert_equal_up_to_rounding(merged(input_ids).logits, expected)
    assert merged.state_dict().keys() == plain.state_dict().keys()

    unloaded = adapted(overrides, **EVERYTHING).eval().unload()
    assert_equal_up_to_rounding(unloaded(input_ids).logits, plain(input_ids).logits)


@torch.no_grad()
def test_two_adapters_on_one_base(tmp_path):
    """Switched, and swapped in place by PEFT's hot-swap, which needs no new modules."""
    input_ids = random_ids(2, 9)
    expected = []
    for seed in range(2):
        model = adapted(seed=seed, **EVERYTHING).eval()
        model.save_pretrained(tmp_path / str(seed))
        expected.append(model(input_ids).logits)
    assert (expected[0] - expected[1]).abs().max() > 0.1

    base = tiny_model(num_hidden_layers=3, first_k_dense_replace=1)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "0", adapter_name="first").eval()
    model.load_adapter(tmp_path / "1", "second")
    for name, logits in (("second", expected[1]), ("first", expected[0])):
        model.set_adapter(name)
        assert_equal_up_to_rounding(model(input_ids).logits, logits)

    from peft.utils.hotswap import hotswap_adapter

    model.delete_adapter("second")
    modules = len(list(model.modules()))
    hotswap_adapter(model, str(tmp_path / "1"), adapter_name="first")
    assert_equal_up_to_rounding(model(input_ids).logits, expected[1])
    assert len(list(model.modules())) == modules


@pytest.mark.parametrize("backend", EXPERTS_BACKENDS)
@pytest.mark.parametrize("mode", ["plain", "checkpointed", "frozen"])
def test_gradients_are_those_of_the_weights(backend, mode):
    """With W + s * B A in the experts, dL/dA = s * B^T dL/dW and dL/dB = s * dL/dW A^T: against a model that holds the
    merged weights, in every iteration of every layer."""
    model = adapted({"inner_iter": 3}, **{**NOTHING, "experts": True}).train()
    base = model.get_base_model()
    base.set_experts_implementation(backend)
    if mode == "checkpointed":
        enable_checkpointing(base)
    input_ids = random_ids(2, 9)
    with torch.no_grad() if mode == "frozen" else contextlib.nullcontext():
        output = model(input_ids, labels=input_ids)
    merged = adapted({"inner_iter": 3}, **{**NOTHING, "experts": True}).merge_and_unload().train()
    merged.requires_grad_(True)
    expected = merged(input_ids, labels=input_ids)
    assert_equal_up_to_rounding(output.logits, expected.logits)
    if mode == "frozen":
        return
    output.loss.backward()
    expected.loss.backward()
    for layer, plain in zip(base.model.layers[1:], merged.model.layers[1:], strict=True):
        wrapper = layer.mlp.experts
        for _ in range(2):
            gradient = getattr(plain.mlp.experts, wrapper.parameter_name).grad
            a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            experts, scaling = len(gradient), wrapper.scaling["default"]
            by_expert = a.view(experts, 3, -1), b.view(len(b), 3, experts)
            expected_a = scaling * torch.einsum("ore,eoi->eri", by_expert[1], gradient).flatten(0, 1)
            expected_b = scaling * torch.einsum("eoi,eri->ore", gradient, by_expert[0]).flatten(1)
            assert_equal_up_to_rounding(a.grad, expected_a)
            assert_equal_up_to_rounding(b.grad, expected_b)
            wrapper = wrapper.base_layer


RESIDUAL_RULES = {
    "outer": {},
    "inner": {"inner_residual": True, "outer_residual": False},
    "init": {"init_residual": True, "inner_residual": False, "outer_residual": False},
    "prenorm": {"prenorm_residual": True},
    "refine": {"upcycling": "refine", "norm_topk_prob": True},
    "split": {"upcycling": "split", "norm_topk_prob": True},
}
EXPERTS_ALONE = {**NOTHING, "experts": True, "iteration_scales": False}


class TestRowsAreMultiplied:
    """`W x + s * B (A x)` on the rows of each expert, on the CPU and as on other devices, against PEFT's own way, in
    which every call of the experts multiplies by `W + s * B A`."""

    @staticmethod
    def outcome(monkeypatch, way: str, model, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Logits and the gradients of all adapters."""

        def refuse(*_):
            raise AssertionError("adapters are added to weights")

        input_ids = torch.tensor([[5, 7, 7, 9, 5]])  # so few that some experts have no token
        with monkeypatch.context() as patch, torch.autocast("cpu", autocast, enabled=autocast is not None):
            if way == "peft":
                patch.setattr("modeling_coe.modeling_coe.sharing_weights", lambda _: contextlib.nullcontext())
            else:
                patch.setattr(ParamWrapper, "_activate_lora", refuse)
            if way == "elsewhere":
                patch.setattr("modeling_coe.experts._is_computed_here", lambda *_: False)
            output = model(input_ids, labels=input_ids)
            output.loss.backward()
            with torch.no_grad():
                frozen = [model(ids, use_cache=False).logits for ids in (input_ids, input_ids[:, :1])]
        trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(gradient is not None for gradient in trained.values())  # data parallelism waits for each
        return {"logits": output.logits, "frozen": frozen[0], "one token": frozen[1], **trained}

    def compare(self, monkeypatch, make_model, tolerance: float = 1e-4, autocast: torch.dtype | None = None):
        expected = self.outcome(monkeypatch, "peft", make_model().train())
        for way in ("here", "elsewhere"):
            actual = self.outcome(monkeypatch, way, make_model().train(), autocast)
            assert actual.keys() == expected.keys()
            for name, tensor in actual.items():
                bound = tolerance * max(1.0, expected[name].abs().max().item())
                torch.testing.assert_close(tensor.float(), expected[name].float(), atol=bound, rtol=0, msg=name)
        return expected

    @pytest.mark.parametrize(
        ("rule", "iterations"),
        [
            (rule, iterations)
            for rule in RESIDUAL_RULES
            for iterations in (1, 2, 4)
            if iterations > 1 or "upcycling" not in RESIDUAL_RULES[rule]
        ],
    )
    def test_residual_rules(self, monkeypatch, rule, iterations):
        overrides = {"inner_iter": iterations, **RESIDUAL_RULES[rule]}
        self.compare(monkeypatch, lambda: adapted(overrides, **EXPERTS_ALONE))

    def test_experts_without_tokens(self, monkeypatch):
        gradients = self.compare(monkeypatch, lambda: adapted({"inner_iter": 1}, **EXPERTS_ALONE))
        reached = {
            name: gradient.view(8, 3, -1).flatten(1).any(dim=1)
            for name, gradient in gradients.items()
            if "lora_A" in name
        }
        assert len(reached) == 4 and all(0 < experts.sum() < 8 for experts in reached.values())

    @pytest.mark.parametrize(
        "options",
        [
            {"r": 1},
            {"r": 8, "lora_alpha": 32},
            {"r": 5, "use_rslora": True},
            {"r": 4, "init_lora_weights": True},  # B is zero: no gradient of A
            {"r": 4, "expert_r": 2},
        ],
        ids=str,
    )
    def test_ranks_and_scalings(self, monkeypatch, options):
        self.compare(monkeypatch, lambda: adapted(**EXPERTS_ALONE, **options))

    @pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
    def test_one_projection_alone(self, monkeypatch, name):
        def make_model():
            config = peft.LoraConfig(
                target_modules=["o_proj"],
                target_parameters=[f"mlp.experts.{name}"],
                r=3,
                init_lora_weights=False,
            )
            model = tiny_model(inner_iter=3)
            torch.manual_seed(5)
            return peft.get_peft_model(model, config)

        self.compare(monkeypatch, make_model)

    @pytest.mark.parametrize("trained", ["both", "second", "A"])
    def test_several_adapters(self, monkeypatch, trained):
        def make_model():
            model = adapted(**EXPERTS_ALONE)
            model.add_adapter("second", lora_config(model.get_base_model(), **EXPERTS_ALONE, r=5, lora_alpha=2))
            for name, parameter in model.named_parameters():
                if "second" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
            model.base_model.set_adapter(["default", "second"])
            for name, parameter in model.named_parameters():
                chosen = {"both": "lora_", "second": "second", "A": "lora_A"}[trained]
                parameter.requires_grad_("lora_" in name and chosen in name)
            return model

        self.compare(monkeypatch, make_model)

    def test_weights_are_trained_too(self, monkeypatch):
        def make_model():
            model = adapted({"inner_iter": 3}, **EXPERTS_ALONE)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("experts" in name)
            return model

        self.compare(monkeypatch, make_model)

    def test_checkpointing(self, monkeypatch):
        def make_model():
            model = adapted(**EXPERTS_ALONE)
            enable_checkpointing(model.get_base_model())
            return model

        self.compare(monkeypatch, make_model)

    def test_blocks_of_experts(self, monkeypatch):
        monkeypatch.setattr("modeling_coe.grouped_experts._CACHED_BYTES", 400)
        self.compare(monkeypatch, lambda: adapted({"inner_iter": 3}, **EXPERTS_ALONE))

    @pytest.mark.parametrize("mode", ["weights in bfloat16", "autocast"])
    @pytest.mark.parametrize("width", [16, 11])  # torch's grouped products want rows of 16 bytes
    def test_half_precision(self, monkeypatch, width, mode):
        """Adapters stay in float32, and their gradients come in it."""

        def make_model():
            # So small that no token changes its experts by rounding.
            model = tiny_model(num_hidden_layers=1, inner_iter=1, initializer_range=0.05, moe_intermediate_size=width)
            if mode != "autocast":
                model = model.to(torch.bfloat16)
            torch.manual_seed(3)
            return peft.get_peft_model(model, lora_config(model, **EXPERTS_ALONE, r=4, init_lora_weights=False))

        gradients = self.compare(
            monkeypatch, make_model, tolerance=0.03, autocast=torch.bfloat16 if mode == "autocast" else None
        )
        assert all(gradient.dtype == torch.float32 for name, gradient in gradients.items() if "lora_" in name)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        num_experts=st.integers(1, 6),
        hidden=st.integers(1, 5).map(lambda n: 4 * n),
        width=st.integers(1, 5).map(lambda n: 4 * n),
        rank=st.integers(1, 9),
        alpha=st.floats(0.5, 16),
        num_tokens=st.integers(0, 12),
        chosen=st.data(),
    )
    def test_any_shape(self, num_experts, hidden, width, rank, alpha, num_tokens, chosen):
        """Two calls of experts in float64, against a loop over tokens with weights that hold the adapter."""
        config = tiny_config(
            n_routed_experts=num_experts, num_experts_per_tok=1, hidden_size=hidden, moe_intermediate_size=width
        )
        config._experts_implementation = "grouped_mm"
        holder = torch.nn.Module()
        holder.experts = CoeExperts(config).double().requires_grad_(False)
        torch.manual_seed(0)
        for parameter in holder.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        config = peft.LoraConfig(
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            r=rank,
            lora_alpha=alpha,
            init_lora_weights=False,
        )
        peft.inject_adapter_in_model(config, holder)
        calls = []
        for _ in range(2):
            experts = st.lists(st.integers(0, num_experts - 1), min_size=2 * num_tokens, max_size=2 * num_tokens)
            index = torch.tensor(chosen.draw(experts), dtype=torch.int64).view(num_tokens, 2)
            calls.append((torch.randn(num_tokens, hidden).double(), index, torch.rand(num_tokens, 2).double()))

        adapters = {name: p for name, p in holder.named_parameters() if "lora_" in name}
        with sharing_weights(holder.experts):
            actual = torch.stack([holder.experts(*call) for call in calls])
        actual_gradients = torch.autograd.grad(actual.square().sum(), list(adapters.values()))
        with torch.no_grad(), sharing_weights(holder.experts):
            frozen = torch.stack([holder.experts(*call) for call in calls])
            one_by_one = [holder.experts(*(tensor[row : row + 1] for tensor in calls[0])) for row in range(num_tokens)]

        weights, wrapper = {}, holder.experts
        for _ in range(2):
            name, weight = wrapper.parameter_name, getattr(wrapper.get_base_layer(), wrapper.parameter_name)
            a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            # Expert e has rows e * r, e * r + 1, .. of A, and columns e, N + e, .. of B.
            weights[name] = [
                weight[e] + alpha / rank * b[:, e::num_experts] @ a[e * rank : (e + 1) * rank]
                for e in range(num_experts)
            ]
            wrapper = wrapper.base_layer
        expected = torch.zeros_like(actual)
        for call, (tokens, index, routing) in enumerate(calls):
            for row, slot in itertools.product(range(num_tokens), range(2)):
                gate, up = weights["gate_up_proj"][index[row, slot]].chunk(2)
                down = weights["down_proj"][index[row, slot]]
                expected[call, row] += routing[row, slot] * naive.swiglu(tokens[row], gate, up, down)
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(frozen, expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(torch.cat([expected[0, :0], *one_by_one]), expected[0], atol=1e-9, rtol=1e-9)
        if num_tokens:
            gradients = torch.autograd.grad(expected.square().sum(), list(adapters.values()), materialize_grads=True)
            for one, other in zip(actual_gradients, gradients, strict=True):
                torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


class TestAdaptersAreAdded:
    """What rows cannot be multiplied by is added to the weights, once a layer, and said once."""

    @pytest.fixture
    def messages(self, monkeypatch) -> list[str]:
        messages = []
        monkeypatch.setattr("modeling_coe.experts.logger.warning_once", messages.append)
        return messages

    def losses(self, monkeypatch, model) -> list[torch.Tensor]:
        """In our way and in PEFT's."""
        input_ids = torch.arange(3, 21).view(2, 9)
        ours = model(input_ids, labels=input_ids).loss
        with monkeypatch.context() as patch:
            patch.setattr("modeling_coe.modeling_coe.sharing_weights", lambda _: contextlib.nullcontext())
            return [ours, model(input_ids, labels=input_ids).loss]

    @pytest.mark.parametrize("backend", [*EXPERTS_BACKENDS])
    def test_by_other_implementations(self, monkeypatch, added, messages, backend):
        model = adapted().train()
        model.get_base_model().set_experts_implementation(backend)
        assert_equal_up_to_rounding(*self.losses(monkeypatch, model))
        if backend == "grouped_mm":
            assert not messages
        else:
            assert all(f"`experts_implementation` is '{backend}'" in message for message in messages) and messages

    @pytest.mark.parametrize("kind", ["subclass", "transformed", "ZeRO-3"])
    def test_where_rows_cannot_be_multiplied(self, monkeypatch, added, messages, kind):
        model = adapted().train()
        experts = model.get_base_model().model.layers[1].mlp.experts.get_base_layer()
        reason = {
            "subclass": "`down_proj` is of type Subclass",
            "transformed": "the pass is traced or transformed",
            "ZeRO-3": "weights come and go",
        }[kind]
        if kind == "subclass":
            experts.down_proj = torch.nn.Parameter(experts.down_proj.data.as_subclass(Subclass))
        elif kind == "transformed":
            monkeypatch.setattr(torch._C, "_are_functorch_transforms_active", lambda: True)
        else:
            monkeypatch.setattr("modeling_coe.experts.is_deepspeed_zero3_enabled", lambda: True)
        assert_equal_up_to_rounding(*self.losses(monkeypatch, model))
        assert added and messages and all(reason in message for message in messages)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda wrapper: setattr(wrapper, "parameter_name", "bias"), "there is an adapter of `bias`"),
            (lambda wrapper: wrapper.get_base_layer().to("meta"), "`down_proj` is on meta"),
            (lambda wrapper: wrapper.lora_B.to("meta"), "adapter 'default' of `down_proj` is on another device"),
            (
                lambda wrapper: setattr(wrapper.lora_A["default"], "weight", torch.nn.Parameter(torch.zeros(12, 24))),
                "adapter 'default' of `down_proj` is sharded, or laid out in another way",
            ),
        ],
        ids=["parameter", "device", "device of a factor", "shape"],
    )
    def test_reasons(self, change, reason):
        wrapper = adapted().get_base_model().model.layers[1].mlp.experts
        assert obstacle(wrapper.get_base_layer(), [wrapper, wrapper.base_layer]) is None
        change(wrapper)
        assert reason in obstacle(wrapper.get_base_layer(), [wrapper])


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def added(monkeypatch) -> list:
    """Every wrapper of a parameter that has added its adapters to the weights, once for each time."""
    wrappers = []

    def activate(self, *args):
        wrappers.append(self)
        return original(self, *args)

    original = ParamWrapper._activate_lora
    monkeypatch.setattr(ParamWrapper, "_activate_lora", activate)
    return wrappers


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(("mode", "passes"), [("train", 1), ("checkpointed", 2), ("no_grad", 1)])
@pytest.mark.parametrize(("backend", "additions"), [("grouped_mm", 0), ("eager", 1)])
def test_adapters_are_added_at_most_once_for_all_iterations(added, iterations, mode, passes, backend, additions):
    model = adapted({"inner_iter": iterations}).train()
    model.get_base_model().set_experts_implementation(backend)
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    if mode == "checkpointed":
        enable_checkpointing(model.get_base_model())
    input_ids = random_ids(1, 5)
    with torch.no_grad() if mode == "no_grad" else contextlib.nullcontext():
        loss = model(input_ids, labels=input_ids).loss
    if mode != "no_grad":
        loss.backward()
    assert len(wrappers) == 2 * 2 and len(added) == additions * passes * len(wrappers)
    assert set(added) == (set(wrappers) if additions else set())
    assert not any(hasattr(wrapper.get_base_layer(), "parametrizations") for wrapper in wrappers)
    assert not any(wrapper.disable_adapters or wrapper.merged for wrapper in wrappers)


def rename_in_peft(monkeypatch, model, names: tuple[str, ...]) -> None:
    """Gives what our code takes of PEFT's wrapper another name there, in the wrapper's own use of it too."""
    if "_activate_lora" in names:

        def forward(self, *args):
            with contextlib.nullcontext() if self.merged else self.activate_adapters(self.active_adapters):
                return self.base_layer(*args)

        monkeypatch.setattr(ParamWrapper, "activate_adapters", ParamWrapper._activate_lora, raising=False)
        monkeypatch.delattr(ParamWrapper, "_activate_lora")
        monkeypatch.setattr(ParamWrapper, "forward", forward)
    if "merged_adapters" in names:
        monkeypatch.setattr(ParamWrapper, "merged", property(lambda self: bool(self.names_of_merged)))
        monkeypatch.delattr(peft.tuners.tuners_utils.BaseTunerLayer, "merged_adapters")
        for wrapper in model.modules():
            if isinstance(wrapper, ParamWrapper):
                wrapper.names_of_merged = wrapper.__dict__.pop("merged_adapters")


@pytest.mark.parametrize(
    "names", [(), ("_activate_lora",), ("merged_adapters",), ("_activate_lora", "merged_adapters")]
)
@pytest.mark.parametrize(("backend", "additions"), [("grouped_mm", set()), ("eager", {1})])
def test_names_that_a_release_of_peft_lacks(monkeypatch, added, names, additions, backend):
    """Against PEFT's own way, in which every call of the experts adds the adapters."""
    results = []
    for shares in (False, True):
        model = adapted({"inner_iter": 3}).train()
        model.get_base_model().set_experts_implementation(backend)
        input_ids = torch.arange(3, 21).view(2, 9)
        with monkeypatch.context() as patch:
            if shares:
                rename_in_peft(patch, model, names)
            else:
                patch.setattr("modeling_coe.modeling_coe.sharing_weights", lambda _: contextlib.nullcontext())
            added.clear()
            output = model(input_ids, labels=input_ids)
            output.loss.backward()
            assert {added.count(wrapper) for wrapper in added} == (additions if shares and not names else {3})
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        results.append([output.logits, *gradients])
    for actual, expected in zip(*results, strict=True):
        assert_equal_up_to_rounding(actual, expected)


@torch.no_grad()
def test_adapters_that_are_off_merged_or_several():
    overrides = {"inner_iter": 3, "initializer_range": 0.05}
    model = adapted(overrides).eval()
    input_ids = random_ids(2, 9)
    first = model(input_ids).logits
    with model.disable_adapter():
        plain = tiny_model(num_hidden_layers=3, first_k_dense_replace=1, **overrides)(input_ids).logits
        assert_equal_up_to_rounding(model(input_ids).logits, plain)
    assert_equal_up_to_rounding(model(input_ids).logits, first)

    torch.manual_seed(5)
    base = model.get_base_model()
    model.add_adapter("second", lora_config(base, r=3, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    both = model(input_ids).logits
    model.merge_adapter(["default"])  # the other one is left out then, as PEFT does it
    assert_equal_up_to_rounding(model(input_ids).logits, first)
    model.unmerge_adapter()
    assert_equal_up_to_rounding(model(input_ids).logits, both)
    model.merge_adapter(["default", "second"])
    assert_equal_up_to_rounding(model(input_ids).logits, both)


def test_an_error_in_the_chain_leaves_the_weights_as_they_were(monkeypatch):
    model = adapted().eval()
    layer = model.get_base_model().model.layers[1]
    input_ids = random_ids(1, 5)
    expected = model(input_ids).logits
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(layer, "step", lambda *_: 1 / 0)
        model(input_ids)
    assert not hasattr(layer.mlp.experts.get_base_layer(), "parametrizations")
    assert_equal_up_to_rounding(model(input_ids).logits, expected)


def test_training_goes_on_under_checkpointing():
    losses = []
    for checkpointing in (False, True):
        model = adapted(**EVERYTHING, init_lora_weights=True).train()
        if checkpointing:
            enable_checkpointing(model.get_base_model())
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        torch.manual_seed(3)
        input_ids = random_ids(2, 12)
        losses.append([])
        for _ in range(6):
            loss = model(input_ids, labels=input_ids).loss
            losses[-1].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_generation_with_an_adapter_is_that_of_the_merged_model():
    model = adapted(**EVERYTHING).eval()
    input_ids = random_ids(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=input_ids, **options)
    assert torch.equal(model.merge_and_unload().generate(input_ids=input_ids, **options), expected)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT's name of the cache
def test_prompts_and_prefixes(backbone):
    """PEFT's prefixes are keys and values of heads: there are none in a cache of latents. Prompts fit all."""
    num_heads = {"num_attention_heads": 2} if backbone == "deepseek_v3" else {}
    input_ids = random_ids(2, 6)
    for method in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
        model = tiny_model(**{"backbone": backbone, **BACKBONES[backbone], **num_heads})
        heads = {} if "head_dim" not in BACKBONES[backbone] else {"token_dim": 4 * 16, "num_attention_heads": 4}
        model = peft.get_peft_model(
            model,
            method(
                task_type="CAUSAL_LM", num_virtual_tokens=3, **(heads if method is peft.PrefixTuningConfig else {})
            ),
        )
        if backbone in ("deepseek_v2", "deepseek_v3") and method is peft.PrefixTuningConfig:
            with pytest.raises(
                ValueError, match=r"kv_lora_rank=16.*Prefix tuning does not fit.*prompt tuning or LoRA"
            ):
                model(input_ids, labels=input_ids)
        else:
            model(input_ids, labels=input_ids).loss.backward()
            assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_the_task_follows_the_model():
    assert lora_config(tiny_config()).task_type == "CAUSAL_LM"
    classifier = CoeForSequenceClassification(tiny_config())
    assert lora_config(classifier).task_type == "SEQ_CLS"
    model = peft.get_peft_model(classifier, lora_config(classifier))
    assert any("score" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert lora_config(classifier, task_type="FEATURE_EXTRACTION").task_type == "FEATURE_EXTRACTION"


DENSE = {"n_routed_experts": None}


@pytest.mark.parametrize(
    ("overrides", "options", "error", "message"),
    [
        (DENSE, {}, ValueError, "`experts=True`, but no layer of this model is sparse. Set `experts=False`"),
        (DENSE, {"experts": False, "routers": True}, ValueError, "`routers=True`, but no layer"),
        ({}, NOTHING, ValueError, "leave nothing of this model to adapt"),
        ({"n_shared_experts": 0}, {**NOTHING, "shared_experts": True}, ValueError, "leave nothing"),
        ({}, {"expert_r": 2, "experts": False}, ValueError, "`expert_r=2` with `experts=False`"),
        ({}, {"expert_r": 0}, ValueError, "`expert_r=0`"),
        ({}, {"lora_dropout": 0.1}, ValueError, r"`lora_dropout=0.1` cannot be applied.*`experts=False`"),
        ({}, {"use_dora": True, "experts": False, "routers": True}, ValueError, "`use_dora=True`"),
        ({}, {"lora_bias": True}, ValueError, "`lora_bias=True`"),
        ({}, {"layers_to_transform": [1]}, ValueError, r"`layers_to_transform=\[1\]`"),
        ({}, {"init_lora_weights": "pissa"}, ValueError, "`init_lora_weights='pissa'` reads the weight"),
        ({}, {"target_modules": ["q_proj"]}, TypeError, "`target_modules=.* is what this function sets"),
        ({}, {"expert_r": 2, "rank_pattern": {"o_proj": 4}}, TypeError, "`rank_pattern=.*`expert_r`"),
    ],
)
def test_what_cannot_be_done_is_refused(overrides, options, error, message):
    with pytest.raises(error, match=message):
        lora_config(tiny_config(**overrides), **options)


def test_what_peft_does_to_modules_is_left_to_it():
    config = lora_config(tiny_config(**DENSE), experts=False, lora_dropout=0.1, use_dora=True)
    assert config.lora_dropout == 0.1 and config.use_dora and config.target_parameters is None
    assert lora_config(tiny_config(), rank_pattern={"o_proj": 4}).rank_pattern == {"o_proj": 4}


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="`model_or_config` is of type Linear"):
        lora_config(torch.nn.Linear(2, 2))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        lora_config(tiny_config())
