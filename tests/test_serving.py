"""transformers' own ways to serve: continuous batching, and `transformers serve` asked by OpenAI's client."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from serve.server import TRANSFORMERS, free_port, is_healthy
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from configuration_coe import BACKBONES
from modeling_coe import CoeForCausalLM

from .helpers import ROOT, random_ids, tiny_model
from .test_backbones import WINDOWS, randomize


LATENT = [name for name, backbone in BACKBONES.items() if backbone.has_latent_attention]
PAGED = [name for name in BACKBONES if name not in LATENT]
NEW_TOKENS = 8


def greedy(model: CoeForCausalLM, prompt: list[int]) -> list[int]:
    """The tokens that `generate` adds to one prompt."""
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return generated[0, len(prompt) :].tolist()


# ---- Continuous batching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backbone, attention, options",
    [
        *((name, "sdpa", {}) for name in PAGED),
        *((name, attention, WINDOWS[name]) for name in WINDOWS for attention in ("sdpa", "eager")),
    ],
)
def test_continuous_batching_equals_generate(backbone, attention, options):
    model = randomize(tiny_model(backbone=backbone, upcycling="split", num_key_value_heads=2, **options))
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = -1  # every prompt gets all its tokens
    prompts = [random_ids(length).tolist() for length in (3, 11, 7, 1)]
    expected = [greedy(model, prompt) for prompt in prompts]
    results = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1),
        # Longer prompts than a batch has tokens; without sizes, the cache takes most of the machine's memory.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=8),
    )
    assert [result.error for result in results.values()] == [None] * len(prompts)
    assert [result.generated_tokens for result in results.values()] == expected
    assert model.config._attn_implementation == attention


def open_manager(model: CoeForCausalLM) -> None:
    with model.continuous_batching_context_manager():
        pass


@pytest.mark.parametrize("backbone", LATENT)
@pytest.mark.parametrize(
    "entry",
    [lambda model: model.generate_batch([[5, 6]]), lambda model: model.init_continuous_batching(), open_manager],
    ids=["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"],
)
def test_latent_attention_refuses_and_stays_as_it_was(backbone, entry):
    model = tiny_model(backbone=backbone).train()
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None  # which transformers would replace

    def state() -> tuple:
        config = model.config
        return config.to_dict(), config._attn_implementation, model.generation_config.to_dict(), model.training

    before = state()
    with pytest.raises(ValueError, match=rf"^`backbone='{backbone}'` has latent attention.*Use `generate`.*$"):
        entry(model)
    assert state() == before


# ---- transformers serve ---------------------------------------------------------------------------------------------


def wait_until(holds: Callable[[], bool], log: Path) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


@contextmanager
def serving(log: Path, *options: str) -> Iterator[str]:
    """The address of a server that answers, for as long as the block runs."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, *TRANSFORMERS, "--host", "127.0.0.1", "--port", str(port), *options],
            cwd=log.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: server.poll() is not None or is_healthy(address), log)
        assert server.poll() is None, log.read_text()
        yield f"{address}/v1"
    finally:
        server.kill()
        server.wait()


def answers(client, folder: Path, question: str) -> dict[str, str]:
    """One greedy answer, asked for in every way."""
    messages = [{"role": "user", "content": question}]
    options = {"model": str(folder), "max_tokens": NEW_TOKENS, "temperature": 0}
    # `transformers chat` sends a generation config whole.
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=2, pad_token_id=0)
    whole = {"model": str(folder), "extra_body": {"generation_config": config.to_json_string()}}
    chat, complete = client.chat.completions.create, client.completions.create

    def joined(chunks) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    return {
        "chat": chat(messages=messages, **options).choices[0].message.content,
        "chat, streaming": joined(chat(messages=messages, stream=True, **options)),
        "as `transformers chat`": joined(chat(messages=messages, stream=True, **whole)),
        "completion": complete(prompt=question + "\n", **options).choices[0].text,
        "completion, streaming": "".join(
            chunk.choices[0].text for chunk in complete(prompt=question + "\n", stream=True, **options)
        ),
    }


def saved_chat_model(folder: Path, tokenizer: PreTrainedTokenizerBase, **options) -> CoeForCausalLM:
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    model = tiny_model(num_key_value_heads=2, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def expected_answer(model: CoeForCausalLM, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    tokens = greedy(model, tokenizer(question + "\n").input_ids)
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.skipif(
    not is_serve_available(), reason="`transformers serve` needs fastapi, uvicorn, pydantic and openai"
)
class TestServer:
    question = "Ann has 7 pens."

    @pytest.fixture
    def client(self) -> Iterator:
        import openai

        with openai.OpenAI(api_key="none", base_url="http://127.0.0.1", max_retries=0, timeout=120) as client:
            yield client

    def test_answers_with_the_text_of_generate(self, tokenizer, tmp_path, client):
        folder = tmp_path / "model"
        expected = expected_answer(saved_chat_model(folder, tokenizer), tokenizer, self.question)
        with serving(tmp_path / "log", str(folder)) as client.base_url:
            answered = answers(client, folder, self.question)
        assert expected and answered == dict.fromkeys(answered, expected)

    def test_continuous_batching(self, tokenizer, tmp_path, client):
        """Models are loaded as they are asked for."""
        import openai

        folder, latent, log = tmp_path / "model", tmp_path / "latent", tmp_path / "log"
        model = saved_chat_model(folder, tokenizer, backbone="qwen3_moe")
        expected = expected_answer(model, tokenizer, self.question)
        saved_chat_model(latent, tokenizer)
        sizes = ["--cb-num-blocks", "16", "--cb-max-batch-tokens", "32"]
        with serving(log, "--continuous-batching", *sizes) as client.base_url:
            answered = answers(client, folder, self.question)
            with pytest.raises(openai.InternalServerError):
                client.completions.create(model=str(latent), prompt="Ann", max_tokens=2)
            wait_until(lambda: "`backbone='deepseek_v2'` has latent attention" in log.read_text(), log)
        assert expected and answered == dict.fromkeys(answered, expected)
