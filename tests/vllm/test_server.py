"""Tokens that `vllm serve` gives over HTTP are those of transformers."""

import pytest
from serve.server import serving

from ..helpers import byte_tokenizer
from .helpers import CONTEXT, NEW_TOKENS, assert_same_generations, build_model, build_prompts, generate


openai = pytest.importorskip("openai")


@pytest.mark.parametrize(
    "fields", [{"inner_iter": 3}, {"backbone": "qwen2_moe", "upcycling": "split"}], ids=["latent", "grouped"]
)
def test_tokens_over_http(fields, tmp_path):
    model = build_model(**fields)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    prompts = build_prompts()
    options = f"--dtype float32 --enforce-eager --max-model-len {CONTEXT}"
    with serving("vllm", str(tmp_path), options) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.completions.create(
            model=str(tmp_path),
            prompt=prompts,
            max_tokens=NEW_TOKENS,
            temperature=0.0,
            logprobs=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    results = [(choice.token_ids, choice.logprobs.token_logprobs) for choice in answer.choices]
    assert_same_generations(results, generate(model, prompts))
