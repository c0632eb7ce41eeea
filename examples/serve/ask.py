# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Serves a model, asks it with OpenAI's client, prints the answer as it comes, and stops the server.

    python examples/serve/ask.py --model runs/demo/model --prompt "Ann has 7 pens. Ann buys 3 packs ..."
    python examples/serve/ask.py --model runs/demo/model --prompt "..." --engine transformers
    python examples/serve/ask.py --model runs/demo/model --prompt "..." --url http://127.0.0.1:8000

The prompt ends with a newline, as in training. `--chat` makes it the message of a conversation, for models that were
tuned on conversations and have a chat template.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # of `serve` and `recipe`

from modeling_coe.command_line import InputError, check_positive, check_range, command, one_line, parse, setting
from serve.server import ENGINES, Server, check_engine, check_installed, check_model, serving


@dataclass(frozen=True, kw_only=True)
class AskSettings:
    _argument_group_name: ClassVar[str] = "question"
    model: str = setting(help="folder or Hub name of a model with its tokenizer; with --url, as that server names it")
    prompt: str = setting(help="what the model continues")
    chat: bool = setting(False, "ask by the model's chat template")
    max_tokens: int = setting(128, "of the answer")
    temperature: float = setting(0.0, "0 is greedy")
    engine: str = setting("vllm", "what serves the model", choices=tuple(ENGINES))
    engine_args: str = setting("", 'more of the engine\'s own options: --engine-args="--dtype float32"')
    url: str | None = setting(None, "of a server that runs already, such as http://127.0.0.1:8000")
    timeout: float = setting(600.0, "seconds that the server may take to start")


def parse_settings(argv: list[str] | None = None) -> AskSettings:
    """Reads the command line and checks what can be checked without a server."""
    settings = parse(AskSettings, __doc__.splitlines()[0], argv)
    check_positive(settings, "max_tokens")
    check_range(settings, "temperature", 0)
    check_range(settings, "timeout", 0, exclusive=True)
    if settings.url is not None and settings.engine_args:
        raise InputError(
            f"--engine-args {settings.engine_args} says nothing of a server that runs already. Leave it out."
        )
    return settings


def answer(url: str, settings: AskSettings) -> Iterator[str]:
    """Pieces of the answer of the server at a URL, as they come.

    Raises:
        InputError: The server cannot be reached or refuses.
    """
    from openai import APIError, OpenAI  # here, so that options are explained where it is not installed

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = {
        "model": settings.model,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "stream": True,
    }
    try:
        if settings.chat:
            messages = [{"role": "user", "content": settings.prompt}]
            for chunk in client.chat.completions.create(messages=messages, **asked):
                yield from (choice.delta.content or "" for choice in chunk.choices)
        else:
            for chunk in client.completions.create(prompt=f"{settings.prompt}\n", **asked):
                yield from (choice.text for choice in chunk.choices)
    except APIError as error:
        raise InputError(f"The server at {url} does not answer: {one_line(error)}") from error


def ask(settings: AskSettings) -> None:
    """Prints the answer."""
    check_installed("openai", "The client")
    if settings.url is None:
        check_engine(settings.engine)
        check_model(settings.model)
        server = serving(settings.engine, settings.model, settings.engine_args, settings.timeout)
    else:
        server = nullcontext(Server(settings.url.rstrip("/"), pid=0))
    with server as running:
        for piece in answer(running.url, settings):
            print(piece, end="", flush=True)
        print()


@command
def main(argv: list[str] | None = None) -> None:
    ask(parse_settings(argv))


if __name__ == "__main__":
    main()
