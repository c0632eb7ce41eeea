"""Serves a chain by an engine of several processes and compares its tokens with those of transformers."""

import json
import sys

from .helpers import assert_same_generations, build_model, build_prompts, engine, generate, serve


if __name__ == "__main__":
    folder, fields, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    model = build_model(**fields)
    model.save_pretrained(folder)
    prompts = build_prompts()
    with engine(folder, **options) as llm:
        assert_same_generations(serve(llm, prompts), generate(model, prompts))
    print("The tokens are equal.")
