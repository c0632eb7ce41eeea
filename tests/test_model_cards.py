"""Model cards: figures that were counted on a built model, valid metadata, and nobody's text lost."""

import inspect
import json
import re
from math import comb

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast, TrainingArguments
from transformers.modelcard import TrainingSummary

import model_cards
from configuration_coe import RESIDUAL_RULES, CoeConfig
from modeling_coe import CoeForSequenceClassification

from .helpers import (
    assert_equal_up_to_rounding,
    peft_of_transformers,
    random_ids,
    tiny_config,
    tiny_model,
)
from .hub_server import validate_metadata


RESULT = EvalResult(
    task_type="text-generation",
    dataset_type="openai/gsm8k",
    dataset_name="GSM8K",
    dataset_split="test",
    metric_type="exact_match",
    metric_value=0.25,
)
# What `conversion` writes, in short.
REPORT = {
    "source": {"name": "owner/dense", "model_type": "llama"},
    "options": {"mode": "refine", "iterations": 2, "layers": [0, 1]},
    "exact": True,
    "explanation": "the scales are zero",
    "remarks": ["Routers were drawn at random."],
    "before": {"total_parameters": 1000, "active_parameters": 1000},
    "after": {"total_parameters": 4000, "active_parameters": 2000},
    "verification": {"max_abs_difference": 1.25e-6, "text": "/somebody/text.txt", "tokens": 256},
}


def assert_valid(card: str) -> ModelCardData:
    """The Hub takes the metadata, and `huggingface_hub` reads it and writes it again without a change."""
    assert validate_metadata(card) == ([], [])
    parsed = ModelCard(card)
    assert str(parsed) == card
    return parsed.data


def table(card: str) -> dict[str, str]:
    """Rows of the two-column tables."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("rule", RESIDUAL_RULES)
def test_figures_are_those_of_the_built_model(rule):
    flags = {"inner_iter": 3, "num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 2}
    model = tiny_model(num_hidden_layers=3, first_k_dense_replace=1, **flags, **RESIDUAL_RULES[rule])
    rows = table(str(model_cards.render(model)))

    total = sum(parameter.numel() for parameter in model.parameters())
    expert = model.model.layers[1].mlp.experts
    per_expert = (expert.gate_up_proj.numel() + expert.down_proj.numel()) // 8
    unused = 8 - 3 * 2  # experts of a layer that three choices of two cannot reach
    shared = sum(parameter.numel() for parameter in model.model.layers[1].mlp.shared_experts.parameters())
    times_shared = 1 if rule == "split" else 3
    combinations = comb(8, 2) * comb(6, 2) * comb(4, 2) if rule == "split" else comb(8, 2) ** 3

    assert rows["Layers"] == "3, of which sparse: 1-2"
    assert rows["Iterations C"] == "3"
    assert rows["Routed experts N"] == "8 of width 24"
    assert rows["Experts per token and iteration K"] == "2"
    assert rows["Residual rule"] == f"`{rule}`"
    assert rows["Routers"].startswith(f"one per iteration ({len(model.model.layers[1].mlp.gate)} per layer)")
    assert rows["Shared experts"] == "2 shared experts (width 48 in all)"
    assert rows["Total parameters"] == f"{total:,}"
    assert rows["Active parameters"].split()[0] == f"{total - 2 * unused * per_expert:,}"
    assert rows["Expert FLOPs per token"] == f"{2 * 2 * (3 * 2 * per_expert + times_shared * shared):,}"
    assert rows["Expert combinations per layer"] == f"{combinations:,}"


def test_options_that_stabilise_the_chain():
    config = tiny_config(prenorm_residual=True, iteration_norm=True, residual_scale=2.0)
    card = str(model_cards.render(config))
    assert table(card)["Residual rule"] == "`prenorm`, `iteration_norm=True`, `residual_scale=2.0`"
    assert "norms of their own" in card and "multiplied by 2.0 / (C sqrt(L))" in card
    assert "branch_norm" not in card and "reinject" not in card


def test_large_numbers_dense_layers_and_single_iterations():
    large = CoeConfig(n_routed_experts=512, num_experts_per_tok=64, inner_iter=16)
    assert re.fullmatch(r"\d\.\d{3}e\+\d{4}", table(str(model_cards.render(large)))["Expert combinations per layer"])
    dense = str(model_cards.render(tiny_config(n_routed_experts=None)))
    assert "all of them dense" in dense and "Iterations C" not in dense
    assert "routes each token once through" in str(model_cards.render(tiny_config(inner_iter=1)))
    partly = tiny_config(num_hidden_layers=6, prenorm_residual=True, chain_layers=[1, 2, 5])
    assert "The sparse layers 0, 3-4 are not chained" in str(model_cards.render(partly))
    one_router = table(str(model_cards.render(tiny_config(use_igate=False, n_shared_experts=None))))
    assert one_router["Routers"].startswith("one per layer") and one_router["Shared experts"] == "none"


def test_metadata():
    card = model_cards.render(
        tiny_config(),
        repo_id="owner/tiny",
        results=[RESULT],
        base_model="owner/base",
        dataset=["openai/gsm8k", "a local file.jsonl"],
        license="apache-2.0",
        language="en",
        tags=["math"],
    )
    data = assert_valid(str(card))
    assert data.model_name == "tiny" and data.eval_results == [RESULT]
    assert data.base_model == ["owner/base"] and data.datasets == ["openai/gsm8k"]
    assert (data.license, data.language, data.library_name) == ("apache-2.0", "en", "transformers")
    assert data.pipeline_tag == "text-generation" and data.metrics == ["exact_match"]
    assert data.tags == ["chain-of-experts", "mixture-of-experts", "math"]
    assert "| GSM8K test | exact_match | 0.25 |" in str(card)
    assert_valid(str(model_cards.render(tiny_config())))


def test_head_decides_class_and_task(tmp_path):
    model = CoeForSequenceClassification(tiny_config(num_labels=3))
    card = str(model_cards.render(model, name="model"))
    assert assert_valid(card).pipeline_tag == "text-classification"
    model.save_pretrained(tmp_path / "model")
    config = CoeConfig.from_pretrained(tmp_path / "model")
    assert str(model_cards.render(config, name="model")) == card


def test_results_of_the_trainer_need_the_name_of_the_data():
    results = {"eval_loss": np.float64(1.5), "eval_runtime": 2.0, "eval_steps_per_second": 3.0, "epoch": 1.0}
    card = str(model_cards.render(tiny_config(), results=results, dataset="openai/gsm8k"))
    (result,) = assert_valid(card).eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("loss", 1.5, "openai/gsm8k")
    with pytest.raises(ValueError, match="`dataset` is \\[\\]"):
        model_cards.render(tiny_config(), results=results)


def test_what_is_no_chain_of_experts_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        model_cards.render(torch.nn.Linear(1, 1))


def test_recipe(tmp_path):
    pytest.importorskip("accelerate")
    args = TrainingArguments(
        str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        seed=7,
        use_cpu=True,
    )
    rows = table(str(model_cards.render(tiny_config(aux_loss_alpha=0.02), training_args=args, dataset="openai/gsm8k")))
    assert rows["Data"] == "openai/gsm8k"
    assert rows["Length"] == "30 steps"
    assert rows["Sequences per step"] == "15 (3 per device, 1 process, 5 accumulation steps)"
    assert rows["Learning rate"] == "0.002, schedule `cosine`, warm-up 10.0% of the steps"
    assert "betas 0.9 and 0.999, epsilon 1e-08, weight decay 0.05" in rows["Optimizer"]
    assert rows["Load-balancing loss"] == "coefficient 0.02 per iteration, over the sequence"
    assert rows["Seed"] == "7"


def test_conversion_report_of_the_folder(tmp_path):
    (tmp_path / "conversion_report.json").write_text(json.dumps(REPORT))
    card = model_cards.write(tiny_config(upcycling="refine"), tmp_path).read_text()
    assert assert_valid(card).base_model == ["owner/dense"]
    assert "Converted from [owner/dense]" in card and "computes the same function: the scales are zero." in card
    assert "| total parameters | 1,000 | 4,000 |" in card and "Routers were drawn at random." in card
    assert "| max abs difference | 1.25e-06 |" in card and "| layers | 0, 1 |" in card
    assert "somebody" not in card and "text.txt" in card  # folders of the machine are nobody's business


@pytest.mark.parametrize(
    "report", [{}, {"source": "/somebody/dense"}, {"source": "../dense"}, {"before": 3, "options": None}]
)
def test_conversion_reports_of_other_shapes(tmp_path, report):
    (tmp_path / "conversion_report.json").write_text(json.dumps(report))
    card = model_cards.write(tiny_config(), tmp_path).read_text()
    assert assert_valid(card).base_model is None and "somebody" not in card
    assert ("Where it comes from" in card) == bool(report)


def test_snippets_run(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path / "tiny")
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "Ann": 3, "pens": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path / "tiny")
    card = model_cards.write(model, tmp_path / "tiny").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in snippets(card):
        exec(snippet, names)
    assert len(snippets(card)) == 2
    input_ids = random_ids(1, 9)
    with torch.no_grad():
        assert_equal_up_to_rounding(names["model"](input_ids).logits, model(input_ids).logits)


def test_snippet_of_a_model_that_chats_runs(tmp_path, monkeypatch, capsys, tokenizer):
    """With the messages that its chat template marks, not with the bare prompt."""
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=2)
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}</s>"
    tokenizer.save_pretrained(tmp_path / "tiny")
    model.save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "README.md").unlink()
    card = model_cards.write(model, tmp_path / "tiny", prompt="Ann?").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in snippets(card):
        exec(snippet, names)
    assert tokenizer.decode(names["inputs"]["input_ids"][0]) == "<s>Ann?</s>"
    assert capsys.readouterr().out.startswith("Ann?")
    without = str(model_cards.render(model, name="tiny", prompt="Ann?"))
    assert "chat_template" not in without and "chat_template" in str(model_cards.render(model, chat=True))


class TestMadeFromAnother:
    METADATA = (
        "license: other\nlicense_name: theirs\nlanguage: [en, de]\ndatasets: [owner/texts]\nbase_model: owner/dense"
    )

    @pytest.fixture
    def source(self, tmp_path):
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "README.md").write_text(f"---\n{self.METADATA}\n---\n# Source\n")
        (folder / "conversion_report.json").write_text(json.dumps(REPORT | {"source": {"name": "source"}}))
        return folder

    def test_a_tuned_model_says_where_it_comes_from(self, source, tmp_path):
        card = model_cards.write(tiny_config(), tmp_path / "tuned", made_from=str(source), dataset="openai/gsm8k")
        data = assert_valid(card.read_text())
        assert (data.license, data["license_name"], data.language) == ("other", "theirs", ["en", "de"])
        assert data.base_model == ["owner/dense"] and data.datasets == ["owner/texts", "openai/gsm8k"]
        assert "Converted from [owner/dense]" in card.read_text()
        once = card.read_text()
        model_cards.write(tiny_config(), tmp_path / "tuned")
        assert card.read_text() == once

    def test_what_is_passed_comes_first(self, source):
        card = model_cards.render(tiny_config(), made_from=str(source), license="mit", language="fr", base_model="a/b")
        data = assert_valid(str(card))
        assert (data.license, data.language, data.base_model) == ("mit", "fr", ["a/b"])
        assert data.get("license_name") is None

    def test_a_name_on_the_hub_is_the_base_model(self):
        """Offline its card is out of reach, which is no reason to write none."""
        assert model_cards.inherited("owner/chain") == {"base_model": "owner/chain"}
        data = assert_valid(str(model_cards.render(tiny_config(), made_from="owner/chain")))
        assert data.base_model == ["owner/chain"] and data.license is None

    def test_the_conversion_report_names_it_where_the_card_does_not(self, source):
        (source / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
        assert model_cards.inherited(str(source)) == {}
        (source / "conversion_report.json").write_text(json.dumps(REPORT))
        assert model_cards.inherited(str(source)) == {"base_model": ["owner/dense"]}


def test_snippet_of_an_adapter_runs(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    base = type(tiny_model()).from_pretrained("base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained("adapter")
    before = ModelCard.load(tmp_path / "adapter" / "README.md")
    card = model_cards.write(adapted, "adapter").read_text()
    data = assert_valid(card)
    assert data.library_name == "peft" and data.base_model == before.data.base_model
    assert before.text.strip() in card
    names = {}
    exec(next(snippet for snippet in snippets(card) if "AutoPeftModel" in snippet), names)
    input_ids = random_ids(1, 9)
    with torch.no_grad():
        assert_equal_up_to_rounding(names["model"](input_ids).logits, adapted(input_ids).logits)


class TestExistingCards:
    def test_writing_again_changes_nothing(self, tmp_path):
        details = {"results": [RESULT], "base_model": "owner/base", "license": "mit", "dataset": "openai/gsm8k"}
        path = model_cards.write(tiny_config(), tmp_path, **details)
        first, modified = path.read_bytes(), path.stat().st_mtime_ns
        model_cards.write(tiny_config(), tmp_path, **details)
        model_cards.write(tiny_config(), tmp_path)  # what is not passed stays
        assert path.read_bytes() == first and path.stat().st_mtime_ns == modified
        assert [file.name for file in tmp_path.iterdir()] == ["README.md"]

    @settings(deadline=None, max_examples=25, derandomize=True)
    @given(
        before=st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40),
        after=st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=40),
        newline=st.sampled_from(["\n", "\r\n"]),
        has_metadata=st.booleans(),
    )
    def test_text_of_others_is_kept(self, tmp_path_factory, before, after, newline, has_metadata):
        folder, config, other_config = tmp_path_factory.mktemp("card"), tiny_config(), tiny_config(n_routed_experts=4)
        path = folder / "README.md"
        metadata = "---\nlicense: mit\nmine: 1\n---\n" if has_metadata else ""
        mine, added = (text.replace("\n", newline) for text in (f"# Mine\n{before}", after))
        path.write_bytes((metadata.replace("\n", newline) + mine).encode())
        model_cards.write(config, folder)
        once = path.read_bytes().decode()
        assert once.partition(f"{newline}---{newline}")[2].startswith(mine)
        path.write_bytes((once + added).encode())
        model_cards.write(other_config, folder, results=[RESULT], name="tiny")
        twice = path.read_bytes().decode()
        assert twice.partition(f"{newline}---{newline}")[2].startswith(mine)
        assert twice.endswith(added)
        assert "| Routed experts N | 4 of width 24 |" in twice and "| Routed experts N | 8 " not in twice
        headings = re.findall(r"^## (.+?)\r?$", twice.partition("<!-- coe:architecture -->")[2], re.MULTILINE)
        ours = ["Architecture", "How to load", "Evaluation", "Limitations", "Citation and licence"]
        assert headings[: len(ours)] == ours
        data = ModelCard(twice).data
        assert data.eval_results == [RESULT]
        assert not has_metadata or (data.license == "mit" and data["mine"] == 1)

    def test_metadata_is_completed(self, tmp_path):
        path = tmp_path / "README.md"
        path.write_text("---\ntags: [mine]\nlibrary_name: other\nlicense: mit\nbase_model: owner/base\n---\n# Mine\n")
        model_cards.write(tiny_config(), tmp_path, results=[RESULT], name="tiny")
        data = assert_valid(path.read_text())
        assert data.tags == ["mine", "chain-of-experts", "mixture-of-experts"]
        assert (data.library_name, data.license, data.base_model) == ("other", "mit", "owner/base")
        assert "Licence: `mit`." in path.read_text()
        better = EvalResult(**{**vars(RESULT), "metric_value": 0.5})
        model_cards.write(tiny_config(), tmp_path, results=[better], license="apache-2.0", name="tiny")
        data = assert_valid(path.read_text())
        assert data.eval_results == [better] and data.license == "apache-2.0"
        assert "| GSM8K test | exact_match | 0.5 |" in path.read_text()

    def test_the_folders_name_gives_way_to_the_models(self, tmp_path):
        folder = tmp_path / "model"
        path = model_cards.write(tiny_config(), folder)
        assert "\n# model\n" in path.read_text()
        model_cards.write(tiny_config(), folder, repo_id="owner/chain")
        text = path.read_text()
        assert "\n# chain\n" in text and "\n# model\n" not in text
        path.write_text(text.replace("# chain", "# Mine"))
        model_cards.write(tiny_config(), folder, repo_id="owner/other")
        assert "\n# Mine\n" in path.read_text() and 'from_pretrained("owner/other"' in path.read_text()

    def test_card_of_the_trainer_is_extended(self, tmp_path):
        summary = TrainingSummary("run", tags=["generated_from_trainer"], hyperparameters={"seed": 7})
        (tmp_path / "README.md").write_text(summary.to_model_card())
        own = ModelCard.load(tmp_path / "README.md")
        card = model_cards.write(tiny_config(), tmp_path, license="mit").read_text()
        assert own.text in card and card.index("## Training procedure") < card.index("## Architecture")
        assert assert_valid(card).tags == ["generated_from_trainer", "chain-of-experts", "mixture-of-experts"]

    def test_empty_form_of_transformers_is_replaced(self, tmp_path):
        from transformers.utils import hub

        # As `push_to_hub` makes it for a repository without a card.
        form = re.search(r'model_description = "(.+?)"', inspect.getsource(hub))[1]
        ModelCard.from_template(ModelCardData(tags=["mine"]), model_description=form).save(tmp_path / "README.md")
        card = model_cards.write(tiny_config(), tmp_path, repo_id="owner/tiny").read_text()
        assert "[More Information Needed]" not in card and "\n# tiny\n" in card
        assert assert_valid(card).tags == ["mine", "chain-of-experts", "mixture-of-experts"]

    @pytest.mark.parametrize("damage", [("<!-- /coe:usage -->", ""), ("<!-- coe:usage -->", "<!-- coe:usage -->" * 2)])
    def test_damaged_marks_are_named(self, tmp_path, damage):
        path = model_cards.write(tiny_config(), tmp_path)
        damaged = path.read_text().replace(*damage)
        path.write_text(damaged)
        with pytest.raises(ValueError, match="<!-- coe:usage -->"):
            model_cards.write(tiny_config(), tmp_path)
        assert path.read_text() == damaged


class TestSavedModels:
    @pytest.mark.parametrize("rule", RESIDUAL_RULES)
    def test_a_card_comes_with_the_model(self, tmp_path, rule):
        model = tiny_model(**RESIDUAL_RULES[rule])
        model.save_pretrained(tmp_path / "tiny")
        card = (tmp_path / "tiny" / "README.md").read_text()
        assert_valid(card)
        assert "\n# tiny\n" in card and table(card)["Residual rule"] == f"`{rule}`"

    def test_a_card_that_is_there_stays(self, tmp_path):
        (tmp_path / "README.md").write_text("# Mine\n")
        tiny_model().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "# Mine\n"

    def test_adapters_are_left_to_peft(self, tmp_path):
        peft = peft_of_transformers()
        model = tiny_model()
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "README.md").exists()
