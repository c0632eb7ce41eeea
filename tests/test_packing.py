"""Several sequences in one row, told apart by positions: they neither attend to each other nor share a balance."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from modeling_coe.balancing import load_balancing_loss, packed_sequences

from .helpers import assert_equal_up_to_rounding, enable_checkpointing, random_ids, tiny_model


LENGTHS = (5, 9, 2)


def sequences() -> list[torch.Tensor]:
    return [random_ids(length) for length in LENGTHS]


def flatten(ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in ids])


def pad(ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    labels = input_ids.masked_fill(mask == 0, -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


BACKBONES = [
    {},
    {"backbone": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 8},
    {"backbone": "mixtral", "num_key_value_heads": 2, "sliding_window": 4, "n_shared_experts": 0},
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("overrides", BACKBONES)
@pytest.mark.parametrize("training", [False, True])
def test_logits_are_those_of_the_sequences_alone(overrides, attention, training):
    model = tiny_model(attn_implementation=attention, **overrides).train(training)
    ids = sequences()
    packed = model(**flatten(ids)).logits[0]
    for row, logits in zip(ids, packed.split(LENGTHS), strict=True):
        assert_equal_up_to_rounding(logits, model(row[None]).logits[0])


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_a_padded_batch(scoring_func, checkpointing):
    results = []
    for collate in (pad, flatten):
        torch.manual_seed(1)
        batch = collate(sequences())
        model = tiny_model(scoring_func=scoring_func, aux_loss_alpha=1.0).train()
        if checkpointing:
            enable_checkpointing(model)
        output = model(**batch, num_items_in_batch=torch.tensor(sum(LENGTHS) - len(LENGTHS)))
        output.loss.backward()
        results.append([output.loss, output.aux_loss, *(p.grad for p in model.parameters())])
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-4)


def test_the_aux_loss_is_the_mean_over_sequences():
    model = tiny_model()
    ids = sequences()
    alone = torch.stack([model(row[None], output_router_logits=True).aux_loss for row in ids])
    packed = model(**flatten(ids), output_router_logits=True)
    torch.testing.assert_close(packed.aux_loss, alone.mean())
    as_one = model(**{**flatten(ids), "position_ids": None}, output_router_logits=True)
    assert (as_one.aux_loss - packed.aux_loss).abs() > 0.05

    # Over the batch, sequences do not matter.
    model.config.seq_aux = False
    pooled = sum(
        load_balancing_loss(logits, indices, batch_size=1, seq_aux=False)
        for logits, indices in zip(packed.router_logits, packed.router_indices, strict=True)
    )
    torch.testing.assert_close(model(**flatten(ids), output_router_logits=True).aux_loss, pooled)


@pytest.mark.parametrize(
    ("position_ids", "expected"),
    [
        ([[0, 1, 2, 3, 4]] * 2, [[0] * 5, [1] * 5]),
        ([[7, 8, 9, 10, 11]], [[0] * 5, [1] * 5]),  # one for all rows, not from 0
        ([[0, 1, 0, 1, 2], [0, 0, 0, 1, 0]], [[0, 0, 1, 1, 1], [2, 3, 4, 4, 5]]),
        ([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]], [[0, 1, 2, 2, 2], [3] * 5]),  # padded on the left
    ],
)
def test_sequences_begin_where_positions_do_not_go_on(position_ids, expected):
    assert packed_sequences(torch.tensor(position_ids), 2).tolist() == expected


def test_rows_that_are_packed_and_padded():
    """Two rows of two sequences, padding at their ends: the four sequences alone."""
    model = tiny_model()
    lengths = ((3, 4), (2, 3))
    input_ids, position_ids, mask = random_ids(2, 8), torch.zeros(2, 8).long(), torch.zeros(2, 8).long()
    for row, pair in enumerate(lengths):
        position_ids[row, : sum(pair)] = torch.cat([torch.arange(length) for length in pair])
        mask[row, : sum(pair)] = 1
    output = model(input_ids, position_ids=position_ids, attention_mask=mask, output_router_logits=True)
    expected = 0.0
    for logits, indices in zip(output.router_logits, output.router_indices, strict=True):
        for row, pair in enumerate(lengths):
            start = 8 * row
            for length in pair:
                tokens = slice(start, start + length)
                expected += load_balancing_loss(logits[tokens], indices[tokens], batch_size=1) / 4
                start += length
    torch.testing.assert_close(output.aux_loss, expected)


def test_plain_positions_change_nothing():
    model = tiny_model()
    input_ids = random_ids(3, 7)
    mask = torch.ones_like(input_ids)
    mask[0, :2] = 0
    for options in ({}, {"attention_mask": mask}):
        expected = model(input_ids, output_router_logits=True, **options)
        actual = model(input_ids, output_router_logits=True, position_ids=torch.arange(7)[None], **options)
        assert_equal_up_to_rounding(actual.logits, expected.logits)
        torch.testing.assert_close(actual.aux_loss, expected.aux_loss)


def test_trainer_with_the_flattening_collator(tmp_path):
    """The first loss of training on flattened batches is that on padded ones."""
    losses = []
    for collator in (DataCollatorWithFlattening(), lambda rows: pad([torch.tensor(row["input_ids"]) for row in rows])):
        torch.manual_seed(1)
        data = [{"input_ids": row.tolist()} for row in sequences()]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=len(data),
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(tiny_model(aux_loss_alpha=1.0), arguments, train_dataset=data, data_collator=collator)
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
