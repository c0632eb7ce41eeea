"""The latent attention against transformers' DeepSeek-V2 attention with the same weights."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache, StaticCache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

from modeling_coe import CoeForCausalLM
from modeling_coe.attention import CoeAttention
from modeling_coe.releases import CACHE

from .helpers import TINY, assert_equal_up_to_rounding, random_ids, tiny_config, tiny_model


LENGTH, STATIC_LENGTH = 14, 18
PADDING = 3  # positions that the first of two sequences does not have, on the left
CHUNKS = (7, 1, 1, 3, 2)  # a prompt, two tokens, and candidates that are checked together


@pytest.fixture
def absorbed(monkeypatch) -> list[int]:
    """The query lengths of the calls that absorb `kv_b_proj`."""
    lengths, attention = [], CoeAttention.absorbed_attention

    def spy(self, query, *args):
        lengths.append(query.shape[2])
        return attention(self, query, *args)

    monkeypatch.setattr(CoeAttention, "absorbed_attention", spy)
    return lengths


def make_pair(implementation: str = "sdpa", dtype=torch.float64, **overrides):
    """This package's attention and transformers', with the same weights."""
    config = tiny_config(**overrides)
    config._attn_implementation = implementation
    attention, native = CoeAttention(config, 0).to(dtype).eval(), DeepseekV2Attention(config, 0).to(dtype).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    native.load_state_dict(attention.state_dict())
    return attention, native


def positions(config, start: int, stop: int) -> torch.Tensor:
    return DeepseekV2RotaryEmbedding(config)(torch.zeros(1), torch.arange(start, stop)[None])


def make_mask(start: int, stop: int, context: int, kind: str, dtype=torch.float64) -> torch.Tensor:
    """What queries `start` to `stop` of two sequences see of `context` keys, the first sequence being left-padded."""
    key = torch.arange(context)
    causal = key <= torch.arange(start, stop)[:, None]
    mask = causal & (key >= torch.tensor([PADDING, 0])[:, None, None])
    mask = mask.unsqueeze(1)
    if kind == "bool":
        return mask
    # Eager attention rounds to float32.
    hidden = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) if kind == "float" else float("-inf")
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)


def run(attention, hidden_states, chunks, cache, mask_kind: str | None) -> tuple[torch.Tensor, list]:
    """Outputs of all chunks, one after the other, and the attention weights of each."""
    outputs, weights, start = [], [], 0
    for length in chunks:
        stop = start + length
        context = STATIC_LENGTH if isinstance(cache, StaticCache) else stop
        mask = mask_kind and make_mask(start, stop, context, mask_kind, hidden_states.dtype)
        output, attentions = attention(
            hidden_states[:, start:stop],
            attention_mask=mask,
            **{CACHE: cache},
            position_embeddings=positions(attention.config, start, stop),
        )
        outputs.append(output)
        weights.append(attentions)
        start = stop
    return torch.cat(outputs, dim=1), weights


def make_cache(kind: str, config):
    return (
        DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=STATIC_LENGTH)
    )


class TestDecoding:
    @pytest.mark.parametrize("q_lora_rank", [None, 12])
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("implementation, mask", [("sdpa", "bool"), ("sdpa", "float"), ("eager", "float")])
    def test_masked_chunks(self, absorbed, implementation, mask, cache, q_lora_rank):
        attention, native = make_pair(implementation, q_lora_rank=q_lora_rank)
        hidden_states = torch.randn(2, LENGTH, 32, dtype=torch.float64)
        with torch.no_grad():
            actual, weights = run(attention, hidden_states, CHUNKS, make_cache(cache, attention.config), mask)
            expected, native_weights = run(native, hidden_states, CHUNKS, make_cache(cache, attention.config), mask)
        # Rows of padding see nothing, and mean nothing.
        actual[0, :PADDING] = expected[0, :PADDING] = 0
        # Absorbed, the weights pass through float32, as they do in transformers' eager attention.
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)
        assert expected.std() > 0.1
        assert absorbed[-4:] == list(CHUNKS[1:])
        if implementation == "eager":
            for position, (a, b) in enumerate(zip(weights, native_weights, strict=True)):
                rows = slice(PADDING, None) if position == 0 else slice(None)
                torch.testing.assert_close(a[:, :, rows], b[:, :, rows], atol=1e-6, rtol=0)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_single_tokens_without_mask(self, absorbed, implementation):
        attention, native = make_pair(implementation)
        hidden_states, chunks = torch.randn(3, 6, 32, dtype=torch.float64), (1,) * 6
        with torch.no_grad():
            actual, _ = run(attention, hidden_states, chunks, DynamicCache(), None)
            expected, _ = run(native, hidden_states, chunks, DynamicCache(), None)
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)
        assert len(absorbed) >= 4

    def test_unmasked_chunks_are_left_to_the_backend(self, absorbed):
        """Without a mask it is the backend that decides what several queries see."""
        attention, native = make_pair()
        hidden_states = torch.randn(2, LENGTH, 32, dtype=torch.float64)
        with torch.no_grad():
            actual, _ = run(attention, hidden_states, (9, 5), DynamicCache(), None)
            expected, _ = run(native, hidden_states, (9, 5), DynamicCache(), None)
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
        assert not absorbed

    @pytest.mark.parametrize(
        "overrides", [{"kv_lora_rank": 4}, {"v_head_dim": 40}, {"num_attention_heads": 1}], ids=str
    )
    @pytest.mark.parametrize("grad", [False, True])
    def test_without_cache(self, absorbed, overrides, grad):
        """Latents far narrower than a head are absorbed for a whole masked prompt as well."""
        attention, native = make_pair(**overrides)
        hidden_states = torch.randn(2, LENGTH, 32, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            actual, _ = run(attention, hidden_states, (LENGTH,), None, "bool")
            expected, _ = run(native, hidden_states, (LENGTH,), None, "bool")
        torch.testing.assert_close(
            actual[:, PADDING:], expected[:, PADDING:], atol=2e-6 if absorbed else 1e-12, rtol=0
        )
        assert bool(absorbed) == (not grad and "num_attention_heads" not in overrides)

    @pytest.mark.parametrize("mask", ["bool", "float", "-inf"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_rows_that_see_nothing(self, absorbed, dtype, mask):
        """They are finite where they are in SDPA: padding must not put NaN into the cache of the next layer."""
        attention, native = make_pair(dtype=dtype)
        hidden_states = torch.randn(2, LENGTH, 32).to(dtype)
        outputs = []
        for module in (attention, native):
            with torch.no_grad():
                cache = DynamicCache()
                run(module, hidden_states[:, :8], (8,), cache, "bool")
                masks = make_mask(8, 10, 10, mask, dtype)
                masks[0, :, 0] = make_mask(0, 1, 10, mask, dtype)[0, :, 0]
                embeddings = positions(module.config, 8, 10)
                outputs.append(module(hidden_states[:, 8:10], masks, cache, embeddings)[0])
        actual, expected = outputs
        assert absorbed == [2]
        assert expected.isfinite().all() and actual.isfinite().all()
        torch.testing.assert_close(actual[1], expected[1], atol=0.2, rtol=0.2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_rounding(self, absorbed, dtype):
        """No further from float64 than twice what transformers' eager attention is."""
        attention, native = make_pair("eager", dtype=dtype)
        hidden_states = torch.randn(2, LENGTH, 32).to(dtype)
        exact, _ = make_pair()
        exact.load_state_dict(attention.state_dict())
        with torch.no_grad():
            actual, expected, wanted = (
                run(module, hidden_states.to(module.o_proj.weight.dtype), CHUNKS, DynamicCache(), "float")[0][
                    :, PADDING:
                ]
                for module in (attention, native, exact)
            )
        assert actual.dtype == dtype and absorbed
        assert (actual - wanted).norm() <= 2 * (expected - wanted).norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_autocast(self, absorbed, implementation, dtype):
        attention, native = make_pair(implementation, dtype)
        hidden_states = torch.randn(2, LENGTH, 32).to(dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            actual, _ = run(attention, hidden_states, (LENGTH - 1, 1), DynamicCache(), None)
            expected, _ = run(native, hidden_states, (LENGTH - 1, 1), DynamicCache(), None)
        assert actual.dtype == expected.dtype and absorbed == [1]
        assert (actual - expected).norm() <= 0.02 * expected.norm()

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_attention_weights_are_returned_where_transformers_does(self, absorbed, implementation):
        attention, native = make_pair(implementation)
        hidden_states = torch.randn(2, LENGTH, 32, dtype=torch.float64)
        with torch.no_grad():
            _, actual = run(attention, hidden_states, CHUNKS, DynamicCache(), "float")
            _, expected = run(native, hidden_states, CHUNKS, DynamicCache(), "float")
        assert absorbed
        assert [weights is None for weights in actual] == [weights is None for weights in expected]

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_gradients_through_a_cache(self, absorbed, implementation):
        attention, native = make_pair(implementation)
        hidden_states = torch.randn(2, LENGTH, 32, dtype=torch.float64)
        outcomes = []
        for module in (attention, native):
            inputs = hidden_states.clone().requires_grad_()
            output, _ = run(module, inputs, CHUNKS, DynamicCache(), "float")
            output[:, PADDING:].square().sum().backward()
            outcomes.append([output[:, PADDING:], inputs.grad, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(*outcomes, atol=1e-10, rtol=1e-10)
        assert not absorbed


class TestAbsorbs:
    """When decoding leaves `kv_b_proj` alone."""

    @staticmethod
    def decode(attention) -> torch.Tensor:
        hidden_states = torch.randn(2, LENGTH, 32, dtype=torch.float64)
        return run(attention, hidden_states, (LENGTH - 1, 1), DynamicCache(), None)[0]

    def test_decoding_does(self, absorbed):
        with torch.no_grad():
            self.decode(make_pair()[0])
        with torch.inference_mode():
            self.decode(make_pair("eager")[0])
        assert absorbed == [1, 1]

    def test_not_with_gradient(self, absorbed):
        assert self.decode(make_pair()[0]).requires_grad and not absorbed

    def test_not_for_a_prompt(self, absorbed):
        with torch.no_grad():
            run(make_pair()[0], torch.randn(2, 9, 32, dtype=torch.float64), (9,), DynamicCache(), "bool")
        assert not absorbed

    @pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "paged|sdpa", "kernels/any"])
    def test_not_for_other_backends(self, implementation):
        attention, _ = make_pair()
        query, latent = torch.zeros(2, 4, 1, 16), torch.zeros(2, 1, 9, 16)
        with torch.no_grad():
            assert attention.absorbs(query, latent, None)
            attention.config._attn_implementation = implementation
            assert not attention.absorbs(query, latent, None)

    @pytest.mark.parametrize("mask", [torch.ones(2, 9, dtype=torch.long), torch.ones(2, 1, 9, dtype=torch.bool)])
    def test_not_for_masks_of_other_shapes(self, mask):
        attention, _ = make_pair()
        with torch.no_grad():
            assert not attention.absorbs(torch.zeros(2, 4, 1, 16), torch.zeros(2, 1, 9, 16), mask)

    @pytest.mark.parametrize(
        "change", ["subclass", "wrapper", "hook", "pre-hook", "parametrization", "forward", "pruned"]
    )
    def test_not_where_the_projection_is_changed(self, absorbed, change):
        """Whatever was done to `kv_b_proj` has its effect in decoding too."""
        attention, native = make_pair()
        for module in (attention, native):
            projection = module.kv_b_proj
            if change == "subclass":
                projection.__class__ = type(
                    "Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * x @ self.weight.T}
                )
            elif change == "wrapper":
                module.kv_b_proj = nn.Sequential(projection, nn.Tanh())
            elif change == "hook":
                projection.register_forward_hook(lambda module, args, output: 2 * output)
            elif change == "pre-hook":
                projection.register_forward_pre_hook(lambda module, args: (2 * args[0],))
            elif change == "parametrization":
                nn.utils.parametrize.register_parametrization(projection, "weight", nn.Tanh())
            elif change == "forward":
                projection.forward = lambda x, weight=projection.weight: 2 * x @ weight.T
            else:
                prune.l1_unstructured(projection, "weight", 0.5)
        outputs = []
        for module in (attention, native):
            torch.manual_seed(5)
            with torch.no_grad():
                outputs.append(self.decode(module))
        torch.testing.assert_close(*outputs, atol=2e-6, rtol=0)
        assert not absorbed

    def test_not_with_an_adapter_until_it_is_merged(self, absorbed):
        peft = pytest.importorskip("peft")
        model = tiny_model(num_hidden_layers=1)
        config = peft.LoraConfig(target_modules=["kv_b_proj"], r=2, init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        input_ids = random_ids(1, 9)

        @torch.no_grad()
        def decode():
            cache = model(input_ids[:, :8], use_cache=True)[CACHE]
            return model(input_ids[:, 8:], **{CACHE: cache}).logits

        adapted = decode()
        with torch.no_grad():
            assert_equal_up_to_rounding(adapted, model(input_ids).logits[:, -1:])
        assert not absorbed
        model.model.layers[0].self_attn.kv_b_proj.merge()
        assert_equal_up_to_rounding(decode(), adapted)

    def test_dropout_in_training_mode(self, absorbed):
        """As in Monte Carlo dropout, which samples without gradient."""
        attention, native = (module.train() for module in make_pair("eager", attention_dropout=0.5))
        outputs = []
        for module in (attention, native):
            torch.manual_seed(6)
            with torch.no_grad():
                outputs.append(self.decode(module))
        torch.testing.assert_close(*outputs, atol=2e-6, rtol=0)
        attention.eval()
        with torch.no_grad():
            self.decode(attention)
        assert absorbed == [1]


class TestPaddedValues:
    """SDPA with values as wide as the keys, which long sequences get."""

    @pytest.fixture
    def widths(self, monkeypatch) -> list[int]:
        widths, sdpa = [], nn.functional.scaled_dot_product_attention

        def spy(query, key, value, **kwargs):
            widths.append(value.shape[-1])
            return sdpa(query, key, value, **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
        return widths

    @pytest.mark.parametrize("v_head_dim", [8, 24, 40])
    @pytest.mark.parametrize("mask", [None, "bool", "float"])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_output_and_gradients(self, monkeypatch, widths, v_head_dim, mask, dropout):
        monkeypatch.setattr(CoeAttention, "min_flash_length", 1)
        attention, native = (m.train() for m in make_pair(v_head_dim=v_head_dim, attention_dropout=dropout))
        hidden_states = torch.randn(2, LENGTH, 32, dtype=torch.float64)
        outcomes = []
        for module in (attention, native):
            torch.manual_seed(7)  # of dropout
            inputs = hidden_states.clone().requires_grad_()
            output = run(module, inputs, (LENGTH,), None, mask)[0][:, PADDING:]
            output.square().sum().backward()
            outcomes.append([output, inputs.grad, *(parameter.grad for parameter in module.parameters())])
        torch.testing.assert_close(*outcomes, atol=1e-10, rtol=1e-10)
        assert widths == [max(24, v_head_dim), v_head_dim]

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
    def test_without_gradient(self, monkeypatch, widths, dtype, tolerance):
        monkeypatch.setattr(CoeAttention, "min_flash_length", 4)
        attention, native = make_pair(dtype=dtype)
        hidden_states = torch.randn(2, LENGTH, 32).to(dtype)
        with torch.no_grad():
            actual, _ = run(attention, hidden_states, (10, 3, 1), DynamicCache(), None)
            expected, _ = run(native, hidden_states, (10, 3, 1), DynamicCache(), None)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
        assert widths == [24, 16, 16, 16, 16]

    @pytest.mark.parametrize("length, width", [(127, 16), (128, 24)])
    def test_only_for_long_sequences(self, widths, length, width):
        attention, native = make_pair()
        hidden_states = torch.randn(1, length, 32, dtype=torch.float64)
        actual, expected = (run(module, hidden_states, (length,), None, None)[0] for module in (attention, native))
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
        assert widths == [width, 16]


def make_models(dtype=torch.float32, **overrides) -> tuple[CoeForCausalLM, DeepseekV2ForCausalLM]:
    """A chain of one iteration without its own residual rule, and the DeepSeek-V2 model that it then is."""
    native = DeepseekV2ForCausalLM(
        DeepseekV2Config(**{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, **TINY, **overrides})
    )
    model = CoeForCausalLM(tiny_config(inner_iter=1, prenorm_residual=True, use_igate=False, **overrides))
    model.load_state_dict(native.state_dict())
    return model.to(dtype).eval(), native.to(dtype).eval()


class TestModel:
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_cached_logits_are_deepseek_v2s(self, absorbed, implementation, cache):
        """Left-padded, in chunks, every one with attention weights where there are any."""
        models = make_models()
        input_ids = random_ids(2, LENGTH)
        input_ids[0, :PADDING] = 0
        mask = (input_ids != 0).long()
        outcomes = []
        for model in models:
            model.set_attn_implementation(implementation)
            past, start, logits, attentions = make_cache(cache, model.config), 0, [], []
            for length in CHUNKS:
                stop = start + length
                with torch.no_grad():
                    output = model(
                        input_ids[:, start:stop],
                        attention_mask=mask[:, :stop],
                        **{CACHE: past},
                        output_attentions=implementation == "eager",
                    )
                logits.append(output.logits)
                attentions += [weights[:, :, -1] for weights in output.attentions or ()]
                start = stop
            logits = torch.cat(logits, dim=1)
            logits[0, :PADDING] = 0
            outcomes.append([logits, *attentions])
        torch.testing.assert_close(*outcomes, atol=2e-5, rtol=1e-4)
        assert absorbed[-8:] == [1, 1, 1, 1, 3, 3, 2, 2]
        assert len(attentions) == (10 if implementation == "eager" else 0)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_prompt_of_one_token(self, absorbed, cache):
        model, native = make_models()
        input_ids = random_ids(2, 4)
        logits = []
        for each in (model, native):
            past = make_cache(cache, each.config)
            with torch.no_grad():
                steps = [each(step, **{CACHE: past}).logits for step in input_ids.split(1, dim=1)]
            logits.append(torch.cat(steps, dim=1))
        assert_equal_up_to_rounding(*logits)
        assert absorbed

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_compiled_decoding_is_one_graph(self, kind):
        torch.compiler.reset()
        model = tiny_model(num_hidden_layers=1)
        input_ids = random_ids(2, 7)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        cache = make_cache(kind, model.config)
        with torch.no_grad():
            expected = model(input_ids).logits
            model(input_ids[:, :5], **{CACHE: cache})
            steps = [compiled(step, **{CACHE: cache}).logits for step in input_ids[:, 5:].split(1, dim=1)]
        assert_equal_up_to_rounding(torch.cat(steps, dim=1), expected[:, 5:])

    @torch.no_grad()
    def test_export_with_sequences_of_any_length(self):
        """As transformers' DeepSeek-V2 can be exported: nothing may depend on how long the example was."""
        model = tiny_model(num_hidden_layers=1)
        model.set_experts_implementation("batched_mm")
        program = torch.export.export(
            model,
            (random_ids(1, 6),),
            {"use_cache": False},
            dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=512)}, "use_cache": None},
        ).module()
        for length in (5, 140):
            input_ids = random_ids(1, length)
            actual, expected = program(input_ids, use_cache=False).logits, model(input_ids, use_cache=False).logits
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
