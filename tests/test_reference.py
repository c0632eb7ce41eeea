"""The model against the official implementation: tiny checkpoints with its logits, routing, losses and gradients."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .conftest import REFERENCE
from .helpers import EXPERTS_BACKENDS


CASES = sorted(path.name for path in REFERENCE.glob("*/") if (path / "expected.safetensors").exists()) or ["absent"]
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")

pytestmark = [
    pytest.mark.parametrize("case", CASES),
    pytest.mark.parametrize("backend", EXPERTS_BACKENDS),
    pytest.mark.usefixtures("reference_folder"),
]


def load(case: str, backend: str):
    model, info = AutoModelForCausalLM.from_pretrained(
        REFERENCE / case, experts_implementation=backend, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.model_type == "coe"
    return model, load_file(REFERENCE / case / "expected.safetensors")


def gradient(model, name: str) -> torch.Tensor:
    """Gradient of a parameter under its official per-expert name."""
    parameters = dict(model.named_parameters())
    if (match := EXPERT.fullmatch(name)) is None:
        return parameters[name].grad
    experts, index, projection = match[1], int(match[2]), match[3]
    if projection == "down":
        return parameters[f"{experts}.down_proj"].grad[index]
    return parameters[f"{experts}.gate_up_proj"].grad[index].chunk(2)[projection == "up"]


def test_logits_and_routing(case, backend):
    model, expected = load(case, backend)
    with torch.no_grad():
        output = model(expected["input_ids"], output_router_logits=True)
    torch.testing.assert_close(output.logits, expected["logits"], atol=1e-4, rtol=0)

    num_layers, num_iterations, num_tokens, top_k = expected["routing.indices"].shape
    indices = torch.stack(output.router_indices).view(num_layers, num_iterations, num_tokens, top_k)
    assert torch.equal(indices.sort(dim=-1).values, expected["routing.indices"])

    order = indices.argsort(dim=-1)
    weights = []

    def keep_weights(router, args, outputs):
        weights.append(outputs[1])

    for layer in model.model.layers:
        routers = layer.mlp.gate if model.config.use_igate else [layer.mlp.gate]
        for router in routers:
            router.register_forward_hook(keep_weights)
    with torch.no_grad():
        model(expected["input_ids"])
    weights = torch.stack(weights).view_as(indices).gather(-1, order)
    torch.testing.assert_close(weights, expected["routing.weights"], atol=1e-4, rtol=0)


def test_left_padding(case, backend):
    model, expected = load(case, backend)
    mask = expected["padded.attention_mask"]
    with torch.no_grad():
        output = model(expected["padded.input_ids"], attention_mask=mask, position_ids=expected["padded.position_ids"])
    torch.testing.assert_close(output.logits[mask.bool()], expected["padded.logits"], atol=1e-4, rtol=0)


def test_greedy_generation(case, backend):
    model, expected = load(case, backend)
    generated = model.generate(expected["generate.prompt_ids"], max_new_tokens=16, do_sample=False)
    assert torch.equal(generated, expected["generate.output_ids"])


@pytest.mark.parametrize("kind", ["aux", "noaux"])
def test_loss_and_gradients(case, backend, kind):
    model, expected = load(case, backend)
    model.train()
    alpha = model.config.aux_loss_alpha
    if kind == "noaux":
        model.config.aux_loss_alpha = 0.0
    input_ids = expected["input_ids"]
    output = model(input_ids, labels=input_ids)
    cross_entropy = output.loss.detach()
    if kind == "aux":
        aux_loss = alpha * output.aux_loss.detach()
        torch.testing.assert_close(aux_loss, expected["train.aux_loss"].sum(), atol=1e-7, rtol=0)
        cross_entropy = cross_entropy - aux_loss
    torch.testing.assert_close(cross_entropy, expected["train.loss"], atol=1e-5, rtol=0)

    output.loss.backward()
    prefix = f"grad_{kind}."
    names = [name for name in expected if name.startswith(prefix)]
    assert names
    for name in names:
        tolerance = 5e-5 * expected[name].abs().max().item()
        actual = gradient(model, name.removeprefix(prefix))
        torch.testing.assert_close(actual, expected[name], atol=tolerance, rtol=0, msg=lambda text, n=name: n + text)


def test_aux_loss_of_every_router_call(case, backend):
    from modeling_coe.balancing import load_balancing_loss

    model, expected = load(case, backend)
    input_ids = expected["input_ids"]
    with torch.no_grad():
        output = model(input_ids, output_router_logits=True)
    losses = [
        model.config.aux_loss_alpha
        * load_balancing_loss(logits, indices, batch_size=len(input_ids), seq_aux=model.config.seq_aux)
        for logits, indices in zip(output.router_logits, output.router_indices, strict=True)
    ]
    losses = torch.stack(losses).view_as(expected["train.aux_loss"])
    torch.testing.assert_close(losses, expected["train.aux_loss"], atol=1e-7, rtol=0)
