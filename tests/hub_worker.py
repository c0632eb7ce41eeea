"""One end of a push or a pull: an interpreter that knows the Hub of `test_hub.py` only by its environment.

Reads steps from its input, one JSON object a line, `{"step": name, ...arguments}`, calls the function of that name and
answers with one line, its result or its error. With `--without-package` this project cannot be imported.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


WITH_PACKAGE = "--without-package" not in sys.argv
INPUT_IDS = list(range(3, 20))


class NotInstalled:
    """However this project is installed, its packages cannot be imported."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ("configuration_coe", "modeling_coe", "model_cards", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def facts_of(model: PreTrainedModel) -> dict:
    """A hash of names and tensors, and logits."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    with torch.no_grad():
        logits = model.eval()(torch.tensor([INPUT_IDS])).logits.tolist()
    return {"weights": weights.hexdigest(), "logits": logits}


def build(seed: int) -> PreTrainedModel:
    from tests.helpers import tiny_model

    return tiny_model(seed)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<pad>", "</s>", "ann", "has", "seven", "red", "pens", "and", "buys", "packs"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=32
    )


def push(repo: str, seed: int = 0, **kwargs) -> dict:
    model = build(seed)
    return {"oid": model.push_to_hub(repo, **kwargs).oid, **facts_of(model)}


def push_tokenizer(repo: str) -> dict:
    return {"oid": tokenizer().push_to_hub(repo).oid}


def push_folder(folder: str, repo: str) -> dict:
    """Uploads a folder as it is."""
    return {"oid": HfApi().upload_folder(folder_path=folder, repo_id=repo).oid}


def save_and_push(folder: str, repo: str, seed: int = 0) -> dict:
    build(seed).save_pretrained(folder, push_to_hub=True, repo_id=repo)
    return {}


def train_and_push(folder: str, repo: str, attach_card: bool = False) -> dict:
    model = build(0)
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=2,
        hub_model_id=repo,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": INPUT_IDS, "labels": INPUT_IDS}] * 4
    trainer = transformers.Trainer(model, arguments, train_dataset=data, processing_class=tokenizer())
    if attach_card:
        import model_cards

        model_cards.attach(trainer, license="apache-2.0")
    trainer.train()
    return {"oid": trainer.push_to_hub().oid, **facts_of(model)}


def push_adapter(repo: str, base: str) -> dict:
    import peft

    config = peft.LoraConfig(
        r=2,
        init_lora_weights=False,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    return {"oid": model.push_to_hub(repo).oid, **facts_of(model)}


def pull(repo: str, adapter: str | None = None, **kwargs) -> dict:
    """Loads a model as a user would: by its name alone, or trusting its code where the package is missing."""
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=not WITH_PACKAGE, **kwargs)
    answer = {"module": type(model).__module__}
    if not Path(repo).is_dir():
        cached = hf_hub_download(repo, "config.json", local_files_only=True, **kwargs)
        answer["revision"] = Path(cached).parent.name
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    return {**answer, **facts_of(model)}


def pull_tokenizer(repo: str) -> dict:
    pulled = AutoTokenizer.from_pretrained(repo)
    return {"input_ids": pulled("ann buys seven green pens").input_ids, "eos": pulled.eos_token}


def download(repo: str, filename: str, **kwargs) -> dict:
    return {"text": Path(hf_hub_download(repo, filename, **kwargs)).read_text()}


def push_source(folder: str, repo: str, seed: int) -> dict:
    """Uploads a mixture of experts that is no chain."""
    from tests.conversion_sources import make_source

    make_source(Path(folder), "mixtral", seed=seed)
    HfApi().create_repo(repo, exist_ok=True)
    return {**push_folder(folder, repo), **facts_of(AutoModelForCausalLM.from_pretrained(folder))}


def convert(repo: str, out: str, to: str = "coe", **kwargs) -> dict:
    """Converts a repository by its name."""
    import conversion

    report = conversion.convert(repo, out, conversion.Options(to=to), verify_tokens=8, **kwargs)
    return {"source": report["source"], **facts_of(AutoModelForCausalLM.from_pretrained(out))}


def run_snippets(repo: str) -> dict:
    """Executes the Python blocks of a repository's card, one after the other."""
    card = Path(hf_hub_download(repo, "README.md")).read_text()
    blocks = [part.partition("```")[0] for part in card.split("```python\n")[1:]]
    names: dict = {}
    for block in blocks:
        exec(block, names)
    return {"blocks": len(blocks), **facts_of(names["model"])}


def main() -> None:
    if WITH_PACKAGE:
        import modeling_coe  # noqa: F401  registers the Auto classes
    else:
        sys.meta_path.insert(0, NotInstalled)
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = globals()[request.pop("step")](**request)
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            answer = {"error": str(error), "kinds": kinds}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
