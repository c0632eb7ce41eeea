# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Rendering a model card, and writing it into a folder without losing what somebody else wrote there."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from configuration_coe import CoeConfig

from . import facts


if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


CARD_NAME = "README.md"
REPORT_NAME = "conversion_report.json"
TEMPLATE = Path(__file__).with_name("template.md")

# What tokenizers save chat templates as, besides a field of their configuration.
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
# Metadata that a model takes over from the one it was made from.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "base_model")

# The parts of a card in their order, each between a pair of marks. What is outside of these is never touched.
SECTIONS = ("architecture", "usage", "origin", "training", "evaluation", "limitations", "citation")

# Head of a model's class -> its Auto class and task.
_HEADS = {
    "Model": ("AutoModel", "feature-extraction"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What `Trainer.evaluate` returns besides metrics.
_NO_METRICS = re.compile(r"epoch|step|total_flos|.*(runtime|per_second|num_input_tokens_seen)")
# The description in the empty form that transformers puts beside a model when it pushes one without a card.
_EMPTY_FORM = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)


def inherited(source: str, folder: str | Path | None = None) -> dict[str, Any]:
    """What the card of a model takes over from that of the model it was made from.

    Args:
        source (`str`): Folder or Hub name of the model that another was made from.
        folder (`str` or `Path`, *optional*): Where it lies, if `source` is not the folder.

    Returns:
        `dict[str, Any]`: Those of `license`, `license_name`, `license_link`, `language`, `datasets` and `base_model`
        that its card has. `base_model` is `source` itself where that is a name on the Hub.
    """
    folder = Path(source if folder is None else folder)
    is_folder = folder.is_dir()
    try:
        card = ModelCard.load(folder / CARD_NAME if is_folder else source, ignore_metadata_errors=True)
        data = card.data.to_dict()
    except Exception:  # a card that is broken, or out of reach, is no reason to write none
        data = {}
    kept = {name: data[name] for name in _INHERITED if data.get(name)}
    if _is_on_hub(source) and not Path(source).is_dir():
        kept["base_model"] = source
    elif "base_model" not in kept and (base_models := _hub_source(_report_of(folder))):
        kept["base_model"] = base_models
    return kept


def render(
    model_or_config: PreTrainedModel | CoeConfig,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    results: Sequence[EvalResult] | Mapping[str, float] | None = None,
    training_args: "TrainingArguments | None" = None,
    base_model: str | list[str] | None = None,
    made_from: str | None = None,
    conversion_report: dict[str, Any] | None = None,
    dataset: str | list[str] | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
    prompt: str = "Ann has 7 pens.",
    chat: bool = False,
) -> ModelCard:
    """Makes a model card.

    Args:
        model_or_config (`PreTrainedModel` or `CoeConfig`): What the card describes. An adapter of PEFT's may be around
            the model.
        name (`str`, *optional*): The model's name, by default that of `repo_id`.
        repo_id (`str`, *optional*): Where it will be loaded from, by default a folder called `name`.
        results (`Sequence[EvalResult]` or `Mapping[str, float]`, *optional*): Evaluation results. A mapping, such as
            what `Trainer.evaluate` returns, is of metrics on the one `dataset`.
        training_args (`TrainingArguments`, *optional*): The recipe.
        base_model (`str` or `list[str]`, *optional*): What this model was made from.
        made_from (`str`, *optional*): Folder or Hub name of what this model was made from: what is not passed, such as
            licence, language and base model, is taken from there by [`inherited`], and the conversion report too.
            Training data are joined.
        conversion_report (`dict`, *optional*): What the conversion wrote about itself.
        dataset (`str` or `list[str]`, *optional*): The training data.
        license (`str`, *optional*): Identifier of the licence.
        language (`str` or `list[str]`, *optional*): ISO 639 codes.
        tags (`Sequence[str]`): Tags besides this project's own.
        prompt (`str`): What the example in the card completes, or answers.
        chat (`bool`): Whether the tokenizer has a chat template, which the example then applies.

    Returns:
        `ModelCard`: The card, of which `str` is the text.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if getattr(config, "model_type", None) != CoeConfig.model_type:  # the class may be that of a folder's own code
        raise TypeError(f"`model_or_config` is a {type(model_or_config).__name__}; pass a CoE model or its config.")
    name = name or (repo_id.split("/")[-1] if repo_id else "Chain-of-Experts")
    carried = {} if made_from is None else inherited(made_from)
    report = conversion_report or ({} if made_from is None else _report_of(Path(made_from)))
    base_models = _listed(base_model) or _listed(carried.get("base_model")) or _hub_source(report)
    datasets = _listed(dataset)
    eval_results = _eval_results(results, datasets)
    datasets = list(dict.fromkeys([*_listed(carried.get("datasets")), *datasets]))
    named = {} if license else {name: carried[name] for name in ("license_name", "license_link") if name in carried}
    license = license or carried.get("license")
    auto_class, task = _head(model_or_config)
    adapter = hasattr(model_or_config, "peft_config")
    data = ModelCardData(
        language=language or carried.get("language"),
        license=license,
        **named,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        base_model=[model for model in base_models if _HUB_ID.fullmatch(model)] or None,
        datasets=[dataset for dataset in datasets if _HUB_ID.fullmatch(dataset)] or None,
        metrics=list(dict.fromkeys(result.metric_type for result in eval_results)) or None,
        tags=["chain-of-experts", "mixture-of-experts", *tags],
        eval_results=eval_results or None,
        model_name=name if eval_results else None,
    )
    return ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        title=name,
        description=facts.description(config),
        architecture=facts.architecture(config),
        auto_class=auto_class,
        adapter=adapter,
        location=repo_id or name,
        prompt=prompt,
        chat=chat,
        origin=facts.origin(report, base_models),
        training=facts.training(training_args, config, datasets) if training_args is not None else {},
        evaluation=[
            (
                " ".join(filter(None, [result.dataset_name, result.dataset_config, result.dataset_split])),
                result.metric_name or result.metric_type,
                f"{result.metric_value:.4g}" if isinstance(result.metric_value, float) else result.metric_value,
            )
            for result in eval_results
        ],
        limitations=facts.limitations(config),
        licences=_listed(license),
    )


def write(model_or_config: PreTrainedModel | CoeConfig, folder: str | Path, **details: Any) -> Path:
    """Writes the model card of a folder, `README.md`, or completes the one that is there.

    In an existing card only the parts between this package's marks are replaced, and missing ones are added; parts for
    which nothing is passed stay as they are, and so does a title, unless it is the folder's name. Its metadata is kept
    and completed. A conversion report in the folder is read unless one is passed. The example applies a chat template
    where the folder has one.

    Args:
        model_or_config (`PreTrainedModel` or `CoeConfig`): What the card describes.
        folder (`str` or `Path`): Where the model lies.
        details: Arguments of [`render`]. `name` is that of the folder unless it or `repo_id` is passed.

    Returns:
        `Path`: The card.

    Raises:
        ValueError: A mark of an existing card has no counterpart, so that where a part ends is not known.
    """
    folder = Path(folder)
    path = folder / CARD_NAME
    old = ModelCard.load(path) if path.is_file() else None
    keep = () if details.keys() & {"name", "repo_id", "prompt", "chat"} else ("usage",)
    if old is not None and details.get("license") is None:
        details["license"] = old.data.license
    details["conversion_report"] = details.get("conversion_report") or _report_of(folder)
    details.setdefault("chat", _has_chat_template(folder))
    if not details.get("repo_id"):
        details["name"] = details.get("name") or folder.resolve().name
    card = render(model_or_config, **details)
    if old is not None:
        _merge_metadata(old, card)
        if _is_empty_form(old):
            old.text = card.text
        else:
            # A title that is the folder's name was made here, before the model had another.
            default, title = f"# {folder.resolve().name}\n", card.text.lstrip().partition("\n")[0]
            text = re.sub(rf"\A(\s*){re.escape(default)}", lambda match: f"{match[1]}{title}\n", old.text)
            old.text = _merge_text(text, card.text, keep)
        card = old
    text = str(card)
    if old is None or path.read_bytes().decode("utf-8-sig") != text:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{CARD_NAME}.partial")
        card.save(partial)
        partial.replace(path)
    return path


def attach(trainer: "Trainer", **details: Any) -> None:
    """Lets every model card that a trainer writes be completed by this package.

    `Trainer.push_to_hub` replaces the card in its output folder each time; after this call, what it writes is extended
    by the parts of [`write`].

    Args:
        trainer (`Trainer`): Any trainer, of TRL too.
        details: Arguments of [`render`].
    """
    create = trainer.create_model_card

    @wraps(create)
    def create_and_complete(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        if trainer.is_world_process_zero():
            model = trainer.accelerator.unwrap_model(trainer.model)
            known = {"training_args": trainer.args, "repo_id": trainer.hub_model_id or trainer.args.hub_model_id}
            write(model, trainer.args.output_dir, **known | details)

    trainer.create_model_card = create_and_complete


def _head(model_or_config: PreTrainedModel | CoeConfig) -> tuple[str, str]:
    """Auto class and task of a model, or of the model that a configuration was saved with."""
    if isinstance(model_or_config, CoeConfig):
        class_name = (model_or_config.architectures or ["CoeForCausalLM"])[0]
    else:
        unwrap = getattr(model_or_config, "get_base_model", lambda: model_or_config)
        class_name = type(unwrap()).__name__
    matching = (head for suffix, head in _HEADS.items() if class_name.endswith(suffix))
    return next(matching, _HEADS["ForCausalLM"])


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _is_on_hub(name: Any) -> bool:
    return isinstance(name, str) and "/" in name and not name.startswith(".") and bool(_HUB_ID.fullmatch(name))


def _hub_source(report: dict[str, Any]) -> list[str]:
    """The Hub's name of what a conversion started from, if it has one. A folder has none."""
    source = report.get("source")
    name = source.get("name") if isinstance(source, dict) else source
    return [name] if _is_on_hub(name) else []


def _report_of(folder: Path) -> dict[str, Any]:
    """The conversion report of a folder, empty where it has none."""
    path = folder / REPORT_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    if any((folder / name).exists() for name in CHAT_TEMPLATES):
        return True
    return config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))


def _eval_results(results: Sequence[EvalResult] | Mapping[str, float] | None, datasets: list[str]) -> list[EvalResult]:
    if not isinstance(results, Mapping):
        return list(results or [])
    if len(datasets) != 1:
        raise ValueError(
            f"`results` is a mapping of metrics on one data set, but `dataset` is {datasets}. Name that data set, or "
            "pass a list of `EvalResult`."
        )
    (dataset,) = datasets
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name.removeprefix("eval_"),
            metric_value=value if isinstance(value, int) else float(value),  # YAML takes none of NumPy's
        )
        for name, value in results.items()
        if isinstance(value, int | float) and not _NO_METRICS.fullmatch(name.removeprefix("eval_"))
    ]


def _is_empty_form(card: ModelCard) -> bool:
    """Whether a card is the form that transformers pushes, which nobody has filled in."""
    if _EMPTY_FORM not in card.text:
        return False
    form = ModelCard.from_template(ModelCardData(), model_description=_EMPTY_FORM)
    return card.text.strip() == form.text.strip()


def _merge_metadata(old: ModelCard, new: ModelCard) -> None:
    """Completes the metadata of `old`: lists are joined, results of the same measurement replaced, and fields that
    `old` has are kept, but for those that `new` was made from."""
    data, added = old.data, new.data
    if added.get("base_model"):  # PEFT makes a tag of the old one, which may be a folder
        data.tags = [tag for tag in data.tags or [] if not tag.startswith("base_model:")]
    for field in ("tags", "datasets", "metrics"):
        joined = list(dict.fromkeys([*_listed(data.get(field)), *_listed(added.get(field))]))
        data[field] = joined or None
    for field in ("license", "license_name", "license_link", "language", "base_model"):
        if added.get(field) and _listed(data.get(field)) != _listed(added.get(field)):
            data[field] = added.get(field)
    for field in ("library_name", "pipeline_tag"):
        data[field] = data.get(field) or added.get(field)
    if added.eval_results:
        measured = [
            result
            for result in data.eval_results or []
            if not any(result.is_equal_except_value(other) for other in added.eval_results)
        ]
        data.eval_results = measured + added.eval_results
        data.model_name = data.model_name or added.model_name


def _marks(section: str) -> tuple[str, str]:
    return f"<!-- coe:{section} -->", f"<!-- /coe:{section} -->"


def _find(text: str, section: str) -> tuple[int, int] | None:
    """Where a section is in a text, its marks included."""
    first, last = _marks(section)
    if (text.count(first), text.count(last)) == (0, 0):
        return None
    start, end = text.find(first), text.find(last) + len(last)
    if (text.count(first), text.count(last)) != (1, 1) or end < start:
        raise ValueError(
            f"The model card needs '{first}' and '{last}' once each and in this order, or not at all. Correct them."
        )
    return start, end


def _merge_text(old: str, new: str, keep: Collection[str]) -> str:
    """`old` with the sections of `new`: in the place of its own, else after the one they follow, else at the end.
    Those to `keep` are not replaced."""
    newline = "\r\n" if "\r\n" in old else "\n"
    last = None
    for section in SECTIONS:
        there, here = _find(old, section), _find(new, section)
        if here is not None and not (there and section in keep):
            content = new[slice(*here)].replace("\n", newline)
            if there is not None:
                old = old[: there[0]] + content + old[there[1] :]
            elif last is not None:
                old = old[:last] + newline * 2 + content + old[last:]
            else:
                gap = "" if not old else newline if old.endswith("\n") else newline * 2
                old = old + gap + content + newline
        if (there := _find(old, section)) is not None:
            last = there[1]
    return old
