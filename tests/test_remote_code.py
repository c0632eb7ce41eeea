"""A saved folder loads where this package is not installed, from the code it carries."""

import sys

import pytest
import torch
from transformers.dynamic_module_utils import get_imports

from .helpers import assert_equal_up_to_rounding, random_ids, run_isolated, tiny_model


SCRIPT = """
try:
    import modeling_coe
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("modeling_coe can be imported")
import torch
import transformers

folder, again, inputs = sys.argv[1:]
inputs = torch.load(inputs)
results = {}
for name in ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
    auto_class = getattr(transformers, f"AutoModel{name}")
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    own = {"score.weight", "score.bias", "qa_outputs.weight", "qa_outputs.bias"}
    assert info["missing_keys"] <= own and info["unexpected_keys"] <= {"lm_head.weight"}, info
    assert type(model).__name__ == f"Coe{name or 'Model'}"
    assert type(model).__module__.startswith("transformers_modules")
    assert model.config._experts_implementation == "grouped_mm"
    if name == "ForCausalLM":
        results["logits"] = model(inputs).logits
        results["generated"] = model.generate(inputs, max_new_tokens=5, do_sample=False)
        model.train()(inputs, labels=inputs).loss.backward()
        results["router_gradient"] = model.model.layers[0].mlp.gate[0].weight.grad
        model.save_pretrained(again)
loaded = transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
torch.testing.assert_close(loaded(inputs).logits, results["logits"], atol=1e-4, rtol=1e-4)
torch.save(results, again + "/results.pt")
"""


STABILISED = {"iteration_norm": True, "branch_norm": True, "residual_scale": 1.5, "reinject": 0.5}


@pytest.mark.parametrize("fields", [{}, {"prenorm_residual": True, **STABILISED}], ids=["plain", "stabilised"])
def test_folder_is_self_sufficient(tmp_path, fields):
    model = tiny_model(aux_loss_alpha=0.1, first_k_dense_replace=0, **fields)
    for name, parameter in model.named_parameters():
        if "norms." in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    input_ids = random_ids(2, 7)
    torch.save(input_ids, tmp_path / "inputs.pt")
    run = run_isolated(SCRIPT, tmp_path, folder, again, tmp_path / "inputs.pt")
    assert run.returncode == 0, run.stdout + run.stderr

    results = torch.load(again / "results.pt")
    with torch.no_grad():
        assert_equal_up_to_rounding(results["logits"], model(input_ids).logits)
    assert torch.equal(results["generated"], model.generate(input_ids, max_new_tokens=5, do_sample=False))
    assert results["router_gradient"].any()

    # What was saved there loads here again.
    loaded = type(model).from_pretrained(again)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_code_of_a_folder_asks_for_nothing_that_users_of_transformers_lack(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    at_hand = {*sys.stdlib_module_names, "huggingface_hub", "numpy", "safetensors", "torch", "tqdm", "transformers"}
    # What is imported outside of `try` has to be installed before any of the code is run.
    asked_for = {path.name: set(get_imports(path)) - at_hand for path in tmp_path.glob("*.py")}
    assert "modeling_coe.py" in asked_for and not any(asked_for.values()), asked_for


def test_without_trust_the_folder_does_not_run_its_code(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)"
    )
    run = run_isolated(script, tmp_path, folder)
    assert run.returncode != 0 and "trust_remote_code=True" in run.stderr
