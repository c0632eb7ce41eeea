"""What clients and a small cache do to `vllm serve`: the others get their answers, what cannot be done is refused in
words, and nothing is held afterwards."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx2
import pytest
from recipe.arithmetic import Problems
from serve.server import serving


LENGTH, BLOCK_SIZE = 256, 32
# One request of the greatest length takes 8 blocks; these hold four or five of the requests below.
NUM_BLOCKS = 12
OPTIONS = (
    f"--dtype float32 --enforce-eager --max-model-len {LENGTH} --max-num-seqs 64 --block-size {BLOCK_SIZE} "
    f"--num-gpu-blocks-override {NUM_BLOCKS}"
)
TOKENS = 40  # of an answer
QUESTIONS = [problem.question[:40] for problem in islice(Problems(0, "train"), 8)]


class Server:
    """A client of the server of a model."""

    def __init__(self, url: str, model: str):
        self.model, self.client = model, httpx2.Client(base_url=url, timeout=300)

    def request(self, prompt: str, max_tokens: int = TOKENS, **options) -> dict:
        return {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, **options}

    def complete(self, prompt: str, **options) -> str:
        """The greedy continuation of a prompt."""
        response = self.client.post("/v1/completions", json=self.request(prompt, ignore_eos=True, **options))
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def complete_all(self, prompts: list[str]) -> list[str]:
        """Continuations of prompts that come all at once, each from a client of its own."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self.complete, prompts))

    def metric(self, name: str) -> float:
        """A figure of `/metrics`."""
        (value,) = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(value)

    def wait_until_idle(self) -> None:
        """Returns when no request and no block is held any more."""
        end = time.monotonic() + 60
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while any(held := [self.metric(name) for name in names]):
            assert time.monotonic() < end, dict(zip(names, held, strict=True))
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server(chain_folder: Path) -> Iterator[Server]:
    with serving("vllm", str(chain_folder), OPTIONS) as running:
        yield Server(running.url, str(chain_folder))


@pytest.fixture(scope="module")
def alone(server) -> dict[str, str]:
    """What each question gets while nobody else asks."""
    return {question: server.complete(question) for question in QUESTIONS}


@pytest.fixture(autouse=True)
def nothing_is_held(server):
    yield
    server.wait_until_idle()


def test_questions_have_different_answers(alone):
    assert len(set(alone.values())) == len(QUESTIONS)


def test_many_clients_and_a_full_cache(server, alone):
    """64 at once, of which the cache holds a few: some are preempted, begin anew, and get the same."""
    before = server.metric("num_preemptions_total")
    prompts = QUESTIONS * 8
    assert server.complete_all(prompts) == [alone[prompt] for prompt in prompts]
    assert server.metric("num_preemptions_total") > before


def test_a_client_that_leaves_half_way(server, alone):
    """Its request is given up; those of others are not."""
    others = QUESTIONS[1:]
    expected = [alone[question] for question in others]
    before = server.metric("generation_tokens_total")
    request = server.request(QUESTIONS[0], max_tokens=200, stream=True, ignore_eos=True)
    with ThreadPoolExecutor() as pool, httpx2.Client(base_url=server.client.base_url, timeout=300) as leaving:
        with leaving.stream("POST", "/v1/completions", json=request) as response:
            lines = (line for line in response.iter_lines() if line)
            begun = [json.loads(line.removeprefix("data: ")) for line in islice(lines, 3)]
            asked = [pool.submit(server.complete, question) for question in others]
        assert all(event["choices"][0]["finish_reason"] is None for event in begun)
        assert [each.result() for each in asked] == expected
    server.wait_until_idle()
    assert server.metric("generation_tokens_total") - before < TOKENS * len(others) + 200


def test_an_answer_ends_with_the_context(server):
    request = server.request(QUESTIONS[0], max_tokens=LENGTH, ignore_eos=True)
    answer = server.client.post("/v1/completions", json=request).json()
    assert answer["usage"]["total_tokens"] == LENGTH
    assert answer["choices"][0]["finish_reason"] == "length"


# What is wrong with a request, by the fields that it has, and words of the answer.
REFUSED = {
    "a prompt longer than the context": ({"prompt": "a" * (LENGTH + 1)}, "maximum context length is 256"),
    "a negative length": ({"max_tokens": -1}, "max_tokens"),
    "a temperature that is none": ({"temperature": "hot"}, "temperature"),
    "no prompt": ({"prompt": None}, "prompt"),
    "a token that the model has not": ({"prompt": [10_000]}, "out of vocabulary"),
    "another model": ({"model": "another"}, "another"),
}


@pytest.mark.parametrize("fields, words", REFUSED.values(), ids=list(REFUSED))
def test_refuses_in_words(server, alone, fields, words):
    """While others are answered."""
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(server.complete, question) for question in QUESTIONS]
        response = server.client.post("/v1/completions", json={**server.request(QUESTIONS[0]), **fields})
        assert [other.result() for other in others] == list(alone.values())
    assert 400 <= response.status_code < 500
    assert words in response.json()["error"]["message"]


def test_refuses_what_is_not_json(server, alone):
    headers = {"Content-Type": "application/json"}
    response = server.client.post("/v1/completions", content='{"model": ', headers=headers)
    assert 400 <= response.status_code < 500
    assert "JSON" in response.json()["error"]["message"]
    assert server.complete(QUESTIONS[0]) == alone[QUESTIONS[0]]
