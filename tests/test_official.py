"""Folders of the official code, as its authors publish them and as their conversion script writes them, against its
equations in float64: loaded, generated with, evaluated, converted."""

import json
from math import exp

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conversion import ConversionError, Options, convert, converter
from conversion.cli import main
from modeling_coe import CoeForCausalLM
from modeling_coe.releases import CACHE

from . import official
from .conversion_sources import edit_json, stored
from .helpers import assert_equal_up_to_rounding, byte_tokenizer


IDS = [5, 9, 33, 7, 60, 22, 4, 80, 12, 41, 3, 17]
# Folders that differ in what config.json says, and in which tensors there are and where.
VARIANTS = {
    "chain": {},
    "chain, one router": {"use_igate": False},
    "chain, sharded": {"shards": 3},
    "chain, one shared expert": {"n_shared_experts": 1},
    "chain, no shared expert, as a number": {"n_shared_experts": 0},
    "chain, both residuals": {"outer_residual": True},
    "chain, outer residual": {"outer_residual": True, "inner_residual": False},
    "chain, plain rotary embedding": {"rope_scaling": None, "rope_theta": 5000.0},
    "chain, no groups": {"n_group": None, "topk_group": None},
    "chain, normalised": {"norm_topk_prob": True},
    "chain, tied": {"tie_word_embeddings": True},
    "chain, class of another name": {"architectures": ["CoEForCausalLM"]},
    "chain, fields left out": dict.fromkeys(("architectures", "auto_map", "torch_dtype", "save_routing_logits"), ...),
    "chain, code on the Hub": {"auto_map": {"AutoConfig": "their/model--configuration_coe.CoeConfig"}},
    "chain, first layout of the config": {
        **dict.fromkeys(("inner_residual", "outer_residual"), ...),
        "residual": "inner",
        "num_key_value_heads": None,
        "_name_or_path": "their/model",
        "_attn_implementation_autoset": True,
    },
    "mixture": official.MIXTURE,
    "mixture, one router": {**official.MIXTURE, "use_igate": False},
    "mixture, no residual": {**official.MIXTURE, "inner_residual": False},
    "mixture, scaled": {**official.MIXTURE, "routed_scaling_factor": 2.5},
}


def load(folder, **kwargs):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def expected_logits(folder, ids=IDS, chain=official.chain) -> torch.Tensor:
    config = official.CONFIG | json.loads((folder / "config.json").read_text())
    return official.logits(ids, stored(folder), config, chain).float()


@pytest.fixture(params=VARIANTS)
def folder(request, tmp_path):
    return official.make_folder(tmp_path / "official", **VARIANTS[request.param])


@torch.no_grad()
def test_logits(folder):
    ids = torch.tensor([IDS])
    expected = expected_logits(folder)
    model = load(folder)
    assert_equal_up_to_rounding(model(ids).logits[0], expected)
    cache = model(ids[:, :7], use_cache=True)[CACHE]
    assert_equal_up_to_rounding(model(ids[:, 7:], **{CACHE: cache}).logits[0], expected[7:])


def test_conversion_there_and_back(folder, tmp_path):
    """Into a folder of ours and back to the official layout, bit by bit but for tensors without elements."""
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert convert(folder, ours, verify_tokens=24)["exact"]
    convert(ours, back, Options(to="official"), verify_tokens=24)
    original = {key: tensor for key, tensor in stored(folder).items() if tensor.numel()}
    for result in (ours, back):
        tensors = stored(result)
        assert tensors.keys() == original.keys()
        assert all(torch.equal(tensors[key], original[key]) for key in tensors)
    before, after = (json.loads((where / "config.json").read_text()) for where in (folder, back))
    assert after["model_type"] == "coe_deepseekv2"
    for name in before.keys() & after.keys() - {"architectures", "num_key_value_heads", "n_shared_experts"}:
        assert before[name] == after[name], name
    assert_equal_up_to_rounding(load(back)(torch.tensor([IDS])).logits[0], expected_logits(folder))


@pytest.mark.parametrize("fields", [{}, official.MIXTURE], ids=["chain", "mixture"])
def test_greedy_generation(tmp_path, fields):
    folder = official.make_folder(tmp_path / "official", **fields, eos_token_id=None)
    generated = load(folder).generate(torch.tensor([IDS]), do_sample=False, max_new_tokens=6)[0].tolist()
    for position in range(len(IDS), len(generated)):
        assert generated[position] == expected_logits(folder, generated[:position])[-1].argmax()


def test_half_precision(tmp_path):
    config = official.CONFIG | {"torch_dtype": "bfloat16"}
    tensors = {name: tensor.bfloat16() for name, tensor in official.make_tensors(config).items()}
    folder = official.save(tmp_path / "official", tensors, config)
    assert load(folder).dtype == torch.bfloat16
    assert_equal_up_to_rounding(
        load(folder, dtype=torch.float32)(torch.tensor([IDS])).logits[0], expected_logits(folder)
    )
    convert(folder, tmp_path / "ours", verify_tokens=24)
    assert {tensor.dtype for tensor in stored(tmp_path / "ours").values()} == {torch.bfloat16}


@pytest.mark.parametrize("trust", [True, False, None])
def test_code_that_is_not_there_is_not_needed(tmp_path, trust, caplog):
    folder = official.make_folder(tmp_path / "official")
    assert type(load(folder, trust_remote_code=trust)) is CoeForCausalLM
    CoeForCausalLM.from_pretrained(folder)
    assert "to instantiate a model of type" not in caplog.text


@pytest.mark.parametrize(
    "residual, rule", [("inner", "inner"), ("outer", "outer"), ("addinit", "init"), ("none", "none")]
)
def test_residual_by_name(tmp_path, residual, rule):
    folder = official.make_folder(
        tmp_path / "official", residual=residual, **dict.fromkeys(("inner_residual", "outer_residual"), ...)
    )
    config = AutoConfig.from_pretrained(folder)
    assert config.residual_rule == rule
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).residual_rule == rule


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"residual": "prenorm"}, "`residual` is 'prenorm'"),
        ({"residual": "inner", "outer_residual": True}, "`residual='inner'` contradicts"),
        ({"residual": "addinit", "outer_residual": True}, "`residual='addinit'` contradicts"),
    ],
)
def test_residual_that_says_nothing(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(official.make_folder(tmp_path / "official", **fields))


def test_shared_experts_that_the_configuration_does_not_have(tmp_path):
    """They would be left out, and another function computed."""
    folder = official.make_folder(tmp_path / "official", n_shared_experts=1)
    edit_json(folder / "config.json", n_shared_experts=None)
    with pytest.raises(ValueError, match=r"(?s)beyond the model's, mlp.shared_experts.*`n_shared_experts=None`"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConversionError, match="`n_shared_experts=None`"):
        convert(folder, tmp_path / "out")


def test_evaluation(tmp_path, capsys):
    """Perplexity of two answers by `examples/evaluation.py`."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import evaluation

    tokenizer = byte_tokenizer()
    folder = official.make_folder(tmp_path / "official")
    tokenizer.save_pretrained(folder)
    rows = [{"question": "2+3?", "answer": "5 #### 5"}, {"question": "a b", "answer": "#### 7"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation.main(["--models", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--max-new-tokens", "4"])
    total, count = 0.0, 0
    for row in rows:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (row["question"], "\n" + row["answer"]))
        scores = expected_logits(folder, prompt + answer)[len(prompt) - 1 : -1].log_softmax(-1)
        total += scores.gather(-1, torch.tensor(answer)[:, None]).sum().item()
        count += len(answer)
    assert f" {exp(-total / count):.3f} ± " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the conversion script

ZERO, SCALAR, VECTOR = torch.zeros(1), torch.tensor(0.7), torch.linspace(-0.5, 0.7, 32)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": ZERO},
        {"weight": SCALAR},
        {"weight": SCALAR.reshape(1)},
        {"weight": VECTOR},
        {"weight": SCALAR, "copied": False, "n_shared_experts": 2},
        {"weight": SCALAR, "use_igate": False, "norm_topk_prob": True},
    ],
    ids=["zero", "number", "one element", "vector", "trained", "one router"],
)
def test_what_the_script_documents_becomes_refine(tmp_path, options):
    folder = official.make_script_folder(tmp_path / "script", **options)
    expected = expected_logits(folder, chain=official.script_chain)
    report = convert(folder, tmp_path / "out", verify_tokens=24)
    assert report["exact"] and report["verification"]["passed"]
    model = load(tmp_path / "out")
    assert (model.config.residual_rule, model.config.inner_iter) == ("refine", 2)
    assert_equal_up_to_rounding(model(torch.tensor([IDS])).logits[0], expected)
    scales = [layer.iteration_scale.weight for layer in model.model.layers]
    assert torch.equal(torch.cat(scales), torch.stack((options["weight"].expand(32), -options["weight"].expand(32))))
    if not options["weight"].any():
        # The mixture that the script was given.
        convert(tmp_path / "out", tmp_path / "mixture", Options(to="source"), verify_tokens=24)
        mixture = load(tmp_path / "mixture")
        assert mixture.config.model_type == "deepseek_v2"
        assert_equal_up_to_rounding(mixture(torch.tensor([IDS])).logits[0], expected)


@pytest.mark.parametrize("iterations", [2, 3])
def test_what_the_script_writes_becomes_refine_before_training(tmp_path, iterations):
    """Its code names the weights otherwise, and has another rule, which is the same as long as they are zero."""
    options = {"inner_iter": iterations, "weight": torch.zeros(32), "name": "mlp.coe_weights.0"}
    folder = official.make_script_folder(tmp_path / "script", **options)
    tensors = stored(folder)
    for i in range(2):
        tensors |= {f"model.layers.{i}.mlp.coe_weights.{t}": torch.zeros(32) for t in range(iterations - 1)}
        tensors[f"model.layers.{i}.mlp.coe_weight"] = torch.zeros(1)
    expected = official.logits(
        IDS, tensors, official.CONFIG | {"inner_iter": iterations}, official.script_chain
    ).float()
    for i in range(2):
        del tensors[f"model.layers.{i}.mlp.coe_weight"]
    config = json.loads((folder / "config.json").read_text())
    folder = official.save(tmp_path / "complete", tensors, config)
    assert convert(folder, tmp_path / "out", verify_tokens=24)["exact"]
    assert_equal_up_to_rounding(load(tmp_path / "out")(torch.tensor([IDS])).logits[0], expected)

    folder = official.save(
        tmp_path / "trained", tensors | {"model.layers.1.mlp.coe_weights.0": torch.ones(32)}, config
    )
    with pytest.raises(ConversionError, match=r"`model.layers.1.mlp.coe_weights.0` is not zero"):
        convert(folder, tmp_path / "other")
    router = "model.layers.1.mlp.gate.1.weight"
    folder = official.save(tmp_path / "other routers", tensors | {router: tensors[router] + 1}, config)
    with pytest.raises(ConversionError, match=rf"`{router}` is not"):
        convert(folder, tmp_path / "other")


def test_scales_of_the_script_are_verified(tmp_path, monkeypatch):
    """By the script's own equations, not by the rule that they become."""
    folder = official.make_script_folder(tmp_path / "script", SCALAR)
    write = converter.write_shard

    def write_others(folder, shard, tensors):
        write(folder, shard, ((name, -tensor if "scale" in name else tensor) for name, tensor in tensors))

    monkeypatch.setattr(converter, "write_shard", write_others)
    with pytest.raises(ConversionError, match="Verification failed"):
        convert(folder, tmp_path / "out", verify_tokens=24)
    assert not (tmp_path / "out").exists()


def test_what_the_script_wrote_does_not_load_as_it_is(tmp_path):
    """The configuration says `both`, which is not what the weights are for."""
    folder = official.make_script_folder(tmp_path / "script", ZERO)
    with pytest.raises(ValueError, match=r"`model.layers.0.mlp.coe_weight`.*coe-convert"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "options, arguments, words",
    [
        ({"weight": SCALAR, "outer_residual": False}, [], ["mlp.coe_weight", "`outer_residual=False`"]),
        ({"weight": SCALAR, "inner_residual": False}, [], ["mlp.coe_weight", "`inner_residual=False`"]),
        ({"weight": SCALAR, "inner_iter": 3}, [], ["`inner_iter`", "3", "two iterations"]),
        ({"weight": torch.zeros(5)}, [], ["mlp.coe_weight", "[5]", "`hidden_size=32`"]),
        ({"weight": SCALAR, "name": "mlp.chain_weight"}, [], ["no place for `model.layers.0.mlp.chain_weight`"]),
        ({"weight": SCALAR}, ["--to", "source"], ["mlp.coe_weight", "without `--to source`"]),
        ({"weight": SCALAR}, ["--mode", "split"], ["--mode"]),
    ],
    ids=["no outer residual", "no inner residual", "three", "shape", "name", "to", "mode"],
)
def test_what_is_refused_of_the_script(tmp_path, capsys, options, arguments, words):
    folder = official.make_script_folder(tmp_path / "script", **options)
    assert main([str(folder), str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("coe-convert: ") and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()
