"""Serves a chain by an engine in a process of its own and compares its tokens with those of transformers."""

import json
import sys

from .helpers import assert_same_generations, build_model, build_prompts, engine, generate, serve


if __name__ == "__main__":
    folder, fields, options, saving = sys.argv[1], *map(json.loads, sys.argv[2:])
    model = build_model(**fields)
    model.save_pretrained(folder, **saving)
    prompts = build_prompts()
    expected = generate(model, prompts)  # before vLLM's Transformers backend makes the model's class its own
    with engine(folder, **options) as llm:
        assert_same_generations(serve(llm, prompts), expected)
    print("The tokens are equal.")
