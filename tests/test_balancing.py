"""The router losses: their values, what they leave out, and how they enter the training loss."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_coe import CoeForCausalLM
from modeling_coe.balancing import label_token_share, load_balancing_loss, router_z_loss

from .helpers import enable_checkpointing, random_ids, tiny_config, tiny_model


def naive_load_balancing_loss(logits, indices, batch_size, scoring_func, seq_aux, token_mask):
    """The definition, token by token, in float64."""
    num_tokens, num_experts = logits.shape
    top_k, length = indices.shape[1], num_tokens // batch_size
    logits = logits.double()
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    if scoring_func == "sigmoid":
        scores = scores / scores.sum(-1, keepdim=True)
    groups = [[(b, s) for s in range(length) if token_mask[b, s]] for b in range(batch_size)]
    if not seq_aux:
        groups = [[token for group in groups for token in group]]
    losses = []
    for group in filter(None, groups):
        rows = [b * length + s for b, s in group]
        loss = 0.0
        for expert in range(num_experts):
            selections = sum((indices[row] == expert).sum().item() for row in rows)
            share = selections * num_experts / (len(rows) * top_k)
            loss = loss + share * sum(scores[row, expert] for row in rows) / len(rows)
        losses.append(loss)
    return sum(losses) / len(losses)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch_size=st.integers(1, 3),
    length=st.integers(1, 5),
    num_experts=st.integers(1, 6),
    scoring_func=st.sampled_from(["softmax", "sigmoid"]),
    seq_aux=st.booleans(),
    padded=st.booleans(),
    data=st.data(),
)
def test_equals_definition(batch_size, length, num_experts, scoring_func, seq_aux, padded, data):
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(batch_size * length, num_experts, dtype=torch.float64, requires_grad=True)
    indices = logits.detach().topk(top_k).indices
    mask = torch.rand(batch_size, length) < 0.6 if padded else torch.ones(batch_size, length, dtype=torch.bool)
    mask[0, -1] = True  # at least one token
    options = {"batch_size": batch_size, "scoring_func": scoring_func, "seq_aux": seq_aux}
    actual = load_balancing_loss(logits, indices, **options, token_mask=mask if padded else None)
    expected = naive_load_balancing_loss(logits, indices, **options, token_mask=mask)
    torch.testing.assert_close(actual, expected)
    (actual_gradient,) = torch.autograd.grad(actual, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(actual_gradient, expected_gradient)


def test_values_by_hand():
    uniform = torch.zeros(4, 4)
    everyone = torch.arange(4)[:, None]
    assert load_balancing_loss(uniform, everyone, batch_size=1).item() == pytest.approx(1.0)
    # All tokens on expert 0, with half of the score: f = (2, 0), P = (1/2, 1/2) for two experts.
    assert load_balancing_loss(torch.zeros(3, 2), torch.zeros(3, 1).long(), batch_size=1).item() == pytest.approx(1.0)
    # ... with three quarters of the score.
    logits = torch.tensor([[3.0, 1.0]]).log().repeat(3, 1)
    assert load_balancing_loss(logits, torch.zeros(3, 1).long(), batch_size=1).item() == pytest.approx(1.5)
    # Two sequences, each on one expert of its own: unbalanced within each, balanced over the batch.
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    indices = torch.tensor([[0], [1]])
    assert load_balancing_loss(logits, indices, batch_size=2, seq_aux=True).item() == pytest.approx(1.5)
    assert load_balancing_loss(logits, indices, batch_size=2, seq_aux=False).item() == pytest.approx(1.0)


def test_z_loss():
    logits = torch.randn(6, 4, dtype=torch.float64)
    expected = sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits) / 6
    torch.testing.assert_close(router_z_loss(logits), expected)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    torch.testing.assert_close(router_z_loss(logits, token_mask=mask), router_z_loss(logits[mask.flatten().bool()]))


@pytest.mark.parametrize("seq_aux", [True, False])
def test_padding_does_not_count(seq_aux):
    model = tiny_model(seq_aux=seq_aux, router_z_loss_coef=0.01).train()
    short, long = random_ids(1, 5), random_ids(1, 9)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = (padded != 0).long()
    output = model(padded, attention_mask=mask)
    alone = [model(short), model(long)]
    if seq_aux:
        torch.testing.assert_close(output.aux_loss, (alone[0].aux_loss + alone[1].aux_loss) / 2)
    else:
        other = padded.clone()
        other[0, :4] = random_ids(4)
        torch.testing.assert_close(model(other, attention_mask=mask).aux_loss, output.aux_loss)
    tokens = torch.tensor([5.0, 9.0])
    z_losses = torch.stack([o.router_z_loss for o in alone])
    torch.testing.assert_close(output.router_z_loss, (z_losses * tokens).sum() / tokens.sum())


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_model_balances_every_router_call_as_configured(seq_aux, scoring_func):
    model = tiny_model(seq_aux=seq_aux, scoring_func=scoring_func, inner_iter=3)
    input_ids = random_ids(2, 7)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    output = model(input_ids, attention_mask=mask, output_router_logits=True)
    expected = sum(
        naive_load_balancing_loss(logits, indices, 2, scoring_func, seq_aux, mask.bool())
        for logits, indices in zip(output.router_logits, output.router_indices, strict=True)
    )
    torch.testing.assert_close(output.aux_loss.double(), expected, atol=1e-5, rtol=1e-5)


def test_vanishing_sigmoid_scores_give_a_finite_loss():
    loss = load_balancing_loss(
        torch.full((3, 4), -120.0), torch.zeros(3, 1).long(), batch_size=1, scoring_func="sigmoid"
    )
    assert torch.isfinite(loss)


@pytest.mark.parametrize("seq_aux", [True, False])
def test_a_mask_says_true_or_false(seq_aux):
    """Collators of packed rows number the sequences of a row in its mask."""
    model = tiny_model(aux_loss_alpha=0.7, router_z_loss_coef=0.3, seq_aux=seq_aux).train()
    input_ids = random_ids(2, 8)
    numbered = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 0], [7, 7, 7, 7, 7, 7, 7, 7]])
    truth = (numbered > 0).long()
    for mask in (numbered, numbered.bool(), numbered.float(), -numbered):
        expected = model(input_ids, attention_mask=truth, labels=input_ids)
        output = model(input_ids, attention_mask=mask, labels=input_ids)
        for name in ("aux_loss", "router_z_loss", "loss"):
            torch.testing.assert_close(output[name], expected[name])
    # The functions themselves, which others may call.
    logits, indices = torch.randn(16, 8), torch.randint(8, (16, 2))
    for loss in (
        lambda mask: load_balancing_loss(logits, indices, batch_size=2, seq_aux=seq_aux, token_mask=mask),
        lambda mask: router_z_loss(logits, token_mask=mask),
    ):
        torch.testing.assert_close(loss(numbered), loss(truth))


@pytest.mark.parametrize("output_router_logits", [False, True])
def test_loss_in_training_is_cross_entropy_plus_aux(output_router_logits):
    model = tiny_model(aux_loss_alpha=0.1, router_z_loss_coef=0.01)
    input_ids = random_ids(2, 9)
    with torch.no_grad():
        evaluated = model(input_ids, labels=input_ids, output_router_logits=output_router_logits)
    trained = model.train()(input_ids, labels=input_ids, output_router_logits=output_router_logits)
    balancing = 0.1 * trained.aux_loss + 0.01 * trained.router_z_loss
    torch.testing.assert_close(trained.loss, evaluated.loss + balancing)
    assert balancing > 0.1
    assert (trained.router_logits is not None) == output_router_logits
    # In evaluation the loss is the cross-entropy; the aux loss shows when the routers are asked for.
    assert (evaluated.aux_loss is not None) == output_router_logits


def test_router_logits_are_per_layer_and_iteration():
    model = tiny_model(inner_iter=3, first_k_dense_replace=1, num_hidden_layers=3)
    output = model(random_ids(2, 7), output_router_logits=True)
    assert len(output.router_logits) == len(output.router_indices) == 2 * 3
    assert all(logits.shape == (14, 8) for logits in output.router_logits)
    assert all(indices.shape == (14, 2) for indices in output.router_indices)


def test_no_balancing_term_without_coefficient_or_sparse_layers():
    for model in (tiny_model(aux_loss_alpha=0.0), tiny_model(n_routed_experts=None)):
        input_ids = random_ids(1, 6)
        output = model.train()(input_ids, labels=input_ids)
        assert output.aux_loss is None
        torch.testing.assert_close(output.loss, model.eval()(input_ids, labels=input_ids).loss)


def test_config_flag_as_trl_reads_it():
    model = tiny_model(output_router_logits=True, aux_loss_alpha=0.01)
    assert model.config.router_aux_loss_coef == 0.01
    output = model(random_ids(1, 6))
    # Unscaled: two layers with two iterations each, 1 per router call when balanced.
    assert 2 < output.aux_loss < 16


def gradients(model: CoeForCausalLM, batches, num_items_in_batch=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for input_ids, labels in batches:
        model(input_ids, labels=labels, num_items_in_batch=num_items_in_batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_accumulation_does_not_multiply_the_aux_term():
    """With sequence-level balance and equal lengths, four micro-batches are exactly one batch."""
    model = tiny_model(aux_loss_alpha=1.0).train()
    input_ids = random_ids(4, 8)
    num_items = torch.tensor(4 * 7)
    whole = gradients(model, [(input_ids, input_ids)], num_items)
    plain = gradients(model, [(input_ids, input_ids)])
    micro = gradients(model, [(row[None], row[None]) for row in input_ids], num_items)
    for name in whole:
        torch.testing.assert_close(micro[name], whole[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(plain[name], whole[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seq_aux", [True, False])
def test_sixteen_at_once_and_four_times_four(seq_aux):
    """Padded sequences of different lengths: gradients of the cross-entropy are equal, and those of the balancing loss
    are the mean of the micro-batches' own, weighted by label tokens."""
    lengths = torch.randint(3, 12, (16,))
    mask = torch.arange(12) < lengths[:, None]
    input_ids = random_ids(16, 12).where(mask, 0)
    labels = input_ids.where(mask, -100)
    num_items = (labels[:, 1:] != -100).sum()

    def accumulated(size: int, aux_loss_alpha: float, objective) -> dict[str, torch.Tensor]:
        model = tiny_model(aux_loss_alpha=aux_loss_alpha, seq_aux=seq_aux).double().train()
        for ids, kept, wanted in zip(*(tensor.split(size) for tensor in (input_ids, mask, labels)), strict=True):
            output = model(ids, attention_mask=kept, labels=wanted, num_items_in_batch=num_items)
            objective(output, (wanted[:, 1:] != -100).sum() / num_items).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    cross_entropy = {size: accumulated(size, 0.0, lambda output, share: output.loss) for size in (16, 4)}
    with_aux = {size: accumulated(size, 1.0, lambda output, share: output.loss) for size in (16, 4)}
    aux = accumulated(4, 1.0, lambda output, share: share * output.aux_loss)
    for name, gradient in cross_entropy[16].items():
        torch.testing.assert_close(cross_entropy[4][name], gradient, atol=1e-12, rtol=1e-9)
        expected = gradient + aux.get(name, 0)
        torch.testing.assert_close(with_aux[4][name], expected, atol=1e-6, rtol=1e-4)  # its scores are float32
    assert any((with_aux[4][name] - with_aux[16][name]).abs().max() > 1e-4 for name in aux)


def test_label_token_share():
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, -100, 9]])
    # Shifting drops the first label of each sequence: three remain.
    assert label_token_share(labels, torch.tensor(6)).item() == pytest.approx(0.5)
    assert label_token_share(labels, 12).item() == pytest.approx(0.25)
    assert label_token_share(labels, 4, shift_labels=labels).item() == pytest.approx(1.0)
    assert label_token_share(labels, None) == 1.0


def test_shifted_labels_count_as_they_are():
    model = tiny_model(aux_loss_alpha=1.0).train()
    input_ids = random_ids(1, 8)
    shifted = torch.full_like(input_ids, -100)
    shifted[0, 2:5] = input_ids[0, 3:6]
    output = model(input_ids, labels=input_ids, shift_labels=shifted, num_items_in_batch=torch.tensor(6))
    logits = output.logits[0, 2:5]
    cross_entropy = torch.nn.functional.cross_entropy(logits, input_ids[0, 3:6], reduction="sum") / 6
    torch.testing.assert_close(output.loss, cross_entropy + 0.5 * output.aux_loss)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_generation_may_return_router_logits(cache):
    """The padding mask then covers past tokens too; only those of this step count."""
    model = tiny_model(output_router_logits=True)
    batch = random_ids(2, 6)
    batch[0, :2] = 0
    mask = (batch != 0).long()
    generated = model.generate(
        batch, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, **cache
    )
    assert generated.shape == (2, 9)


def test_checkpointing_leaves_all_gradients_as_they_are():
    model = tiny_model(aux_loss_alpha=1.0, router_z_loss_coef=0.1).train()
    input_ids = random_ids(2, 8)
    expected = gradients(model, [(input_ids, input_ids)])
    enable_checkpointing(model)
    assert model.model.layers[0].gradient_checkpointing
    actual = gradients(model, [(input_ids, input_ids)])
    assert expected.keys() == actual.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4)
    routers = [name for name in expected if ".gate." in name]
    assert len(routers) == 4 and all(expected[name].any() for name in routers)


def test_reentrant_checkpointing_is_refused_with_an_aux_loss():
    reentrant = {"use_reentrant": True}
    with pytest.raises(ValueError, match=r"use_reentrant=True.*aux_loss_alpha=0.001.*use_reentrant=False"):
        enable_checkpointing(tiny_model(), reentrant)
    with pytest.raises(ValueError, match="use_reentrant"):  # torch's default
        enable_checkpointing(tiny_model(), {"preserve_rng_state": False})
    with warnings.catch_warnings(), pytest.raises(ValueError, match="use_reentrant"):
        warnings.simplefilter("ignore", FutureWarning)  # releases that have the other name deprecate this one
        tiny_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
    model = tiny_model(aux_loss_alpha=0.0).train()
    input_ids = random_ids(1, 6)
    expected = gradients(model, [(input_ids, input_ids)])
    enable_checkpointing(model, reentrant)
    actual = gradients(model, [(input_ids, input_ids)])
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


def test_a_coefficient_set_after_reentrant_checkpointing_is_refused_too():
    model = tiny_model(aux_loss_alpha=0.0).train()
    enable_checkpointing(model, {"use_reentrant": True})
    model.config.aux_loss_alpha = 0.1
    with pytest.raises(ValueError, match="use_reentrant"):
        model(random_ids(1, 6))


def test_labels_of_another_shape():
    model = CoeForCausalLM(tiny_config())
    with pytest.raises(ValueError, match=r"`labels` has shape \(2, 5\).*\(2, 6\)"):
        model(random_ids(2, 6), labels=random_ids(2, 5))
