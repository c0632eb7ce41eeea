"""Servers of `examples/serve/`: started, asked, measured and stopped. With vLLM see `tests/vllm/test_serve.py`."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from serve import ask, load
from serve.server import free_port, running

from modeling_coe.command_line import InputError

from .helpers import ROOT, byte_tokenizer, save_chain, tiny_model


needs_server = pytest.mark.skipif(
    not all(map(find_spec, ("fastapi", "openai", "uvicorn"))),
    reason="`transformers serve` needs fastapi, openai and uvicorn",
)
# A server with a process below it, the number of which it writes into a file. That one ignores SIGTERM, and the server
# does if told to.
PROGRAM = """
import http.server, pathlib, signal, subprocess, sys
port, file, stubborn = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "stubborn"
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
file.write_text(str(subprocess.Popen([sys.executable, "-c", sleep]).pid))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A chain with random weights and a tokenizer of characters."""
    folder = tmp_path_factory.mktemp("chain")
    save_chain(folder, 1024)
    return folder


def server_command(folder: Path, kind: str = "obedient") -> tuple[list[str], str]:
    """The program's command line and URL."""
    port = free_port()
    return [sys.executable, "-c", PROGRAM, str(port), str(folder / "pid"), kind], f"http://127.0.0.1:{port}"


def has_ended(pid: int) -> bool:
    """A process that nobody has waited for is one that ended, too."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_for_end(pid: int) -> None:
    end = time.monotonic() + 60
    while not has_ended(pid):
        assert time.monotonic() < end
        time.sleep(0.1)


# ---- Start and stop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["obedient", "stubborn"])
def test_everything_is_stopped(tmp_path, monkeypatch, kind):
    """The server and what it started, whether or not they end when asked to."""
    monkeypatch.setattr("serve.server.PATIENCE", 1)
    with pytest.raises(KeyError), running(*server_command(tmp_path, kind)) as server:
        below = int((tmp_path / "pid").read_text())
        assert not has_ended(server.pid) and not has_ended(below)
        raise KeyError
    for pid in (server.pid, below):
        wait_for_end(pid)


def test_everything_is_stopped_on_sigterm(tmp_path):
    """Of the process that started the server, as a job scheduler or `timeout` sends it."""
    command, url = server_command(tmp_path)
    program = (
        "import sys, time; from serve.server import running\n"
        "with running(sys.argv[2:], sys.argv[1]) as server: print(server.pid, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, url, *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "examples"), str(ROOT)))},
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(process.stdout.readline()), int((tmp_path / "pid").read_text())]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    process.stdout.close()
    for pid in pids:
        wait_for_end(pid)


def test_a_server_that_ends_shows_its_log():
    command = [sys.executable, "-c", "import sys; print('no such weights'); sys.exit(3)"]
    with pytest.raises(InputError, match=r"(?s)exit status 3 .*\nno such weights"), running(command, "http://[::1]:1"):
        pass


def test_a_server_that_is_never_healthy():
    command = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    with (
        pytest.raises(InputError, match=r"(?s)was not healthy after 2 seconds.*\nloading"),
        running(command, f"http://127.0.0.1:{free_port()}", timeout=2),
    ):
        pass


# ---- Asking and measuring -------------------------------------------------------------------------------------------


@needs_server
def test_ask(folder, capsys):
    """The answer is what the model generates."""
    ask.main(["--model", str(folder), "--prompt", "2 + 3", "--engine", "transformers", "--max-tokens", "8"])
    model, tokenizer = tiny_model(inner_iter=2, max_position_embeddings=1024), byte_tokenizer()
    prompt = tokenizer("2 + 3\n", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=8, do_sample=False, eos_token_id=2)[
        0, len(prompt.input_ids[0]) :
    ]
    assert capsys.readouterr().out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


@needs_server
def test_ask_a_server_that_is_not_there():
    with pytest.raises(SystemExit, match=r"error: The server at http://127\.0\.0\.1:1 does not answer: Connection"):
        ask.main(["--model", "x", "--prompt", "2 + 3", "--url", "http://127.0.0.1:1"])


@needs_server
def test_load(folder, tmp_path, capsys):
    options = "--engines transformers --clients 1 2 --requests 3 --max-tokens 4 --shots 1"
    load.main(["--model", str(folder), "--output-dir", str(tmp_path), *options.split()])
    check_load(tmp_path, [("transformers", 1), ("transformers", 2)], capsys.readouterr().out)


def check_load(output: Path, measured: list[tuple[str, int]], printed: str) -> None:
    """The results of loads of three requests of at most four tokens."""
    results = json.loads((output / "results.json").read_text())
    loads = [(each["engine"], load) for each in results["engines"] for load in each["loads"]]
    assert [(engine, load["clients"]) for engine, load in loads] == measured
    for _, figures in loads:
        answers = figures["answers"]
        assert len(answers) == 3
        assert figures["tokens"] == sum(answer["tokens"] for answer in answers) <= 12
        assert all(0 <= answer["asked"] < answer["first"] <= answer["last"] for answer in answers)
        assert figures["cpu_seconds"] > 0
        assert figures["tokens_per_second"] == pytest.approx(figures["tokens"] / figures["wall_seconds"])
    assert results["machine"]["cpu"] and results["skipped"] == {}
    table = (output / "results.md").read_text()
    assert table in printed
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 2 + len(measured)
    assert (output / "results.png").stat().st_size > 0


def test_figures_of_a_load():
    """By hand: two clients, one answer of one token."""
    answers = [load.Answer("a", 3, 5, 0.0, 1.0, 3.0), load.Answer("b", 3, 1, 0.0, 2.0, 2.0)]
    assert [answer.to_first for answer in answers] == [1.0, 2.0]
    assert [answer.per_token for answer in answers] == [0.5, None]
    assert load.spread([1.0, 2.0]) == (1.5, 1.95)
    assert load.spread([1.0]) == (1.0, 1.0)
    assert load.spread([]) is None


def test_cpu_time_is_that_of_the_server_and_what_it_started():
    busy = "import time; [None for _ in iter(lambda: time.process_time() < 0.5, False)]; print(1, flush=True); input()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    seconds = load.cpu_seconds(process.pid)
    process.communicate(b"\n")
    assert len(seconds) == 2 and max(seconds.values()) > 0.25


def test_prompts_are_different():
    loads = load.make_prompts(seed=0, loads=4, requests=16, shots=3)
    prompts = [prompt for each in loads for prompt in each]
    assert [len(each) for each in loads] == [16] * 4
    assert len(set(prompts)) == len(prompts)
    assert [prompt.count("####") for prompt in prompts] == [0, 1, 2, 3] * 16
    assert all(prompt.endswith("?\n") for prompt in prompts)


# ---- Input that does not work ---------------------------------------------------------------------------------------

# By script: what is wrong, and words of its message: the name, its value, the remedy.
WRONG = {
    ask: [
        ("--max-tokens 0", "--max-tokens is 0", "1 or more"),
        ("--temperature -1", "--temperature is -1.0", "0 or more"),
        ("--timeout 0", "--timeout is 0.0", "more than 0"),
        ("--engine other", "--engine", "'other'", "choose from"),
        ("--url http://127.0.0.1:1 --engine-args=--x", "--engine-args --x", "Leave it out"),
        ("--model nowhere", "--model nowhere cannot be loaded", "Give a folder"),
    ],
    load: [
        ("--requests 0", "--requests is 0", "1 or more"),
        ("--max-tokens 0", "--max-tokens is 0", "1 or more"),
        ("--shots -1", "--shots is -1", "0 or more"),
        ("--timeout nan", "--timeout is nan", "more than 0"),
        ("--clients 0", "--clients 0", "1 or more"),
        ("--clients 33", "--clients 33", "--requests 32"),
        ("--clients 4 4", "--clients", "[4, 4]", "Leave one out"),
        ("--engines vllm vllm", "--engines", "Leave one out"),
        ("--output-dir file/out", "--output-dir", "file is a file", "Choose another folder"),
        ("--model nowhere", "--model nowhere cannot be loaded", "Give a folder"),
    ],
}


@pytest.mark.parametrize(
    ("script", "wrong", "words"),
    [(script, wrong, words) for script, cases in WRONG.items() for wrong, *words in cases],
    ids=[f"{script.__name__} {wrong}" for script, cases in WRONG.items() for wrong, *_ in cases],
)
def test_one_line_that_names_it(folder, tmp_path, monkeypatch, script, wrong, words):
    """Nothing is left behind."""
    if "nowhere" in wrong and not find_spec("fastapi"):
        pytest.skip("`transformers serve` needs fastapi")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    right = "--prompt x --engine transformers" if script is ask else "--output-dir out --engines transformers"
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--model", str(folder), *right.split(), *wrong.split()])
    message = exit_info.value.code  # a text is printed, and the exit code is 1
    assert message.startswith("error: ") and "\n" not in message
    assert [word for word in words if word not in message] == [], message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("script, option", [(ask, "--engine"), (load, "--engines")])
def test_what_an_engine_needs(folder, tmp_path, monkeypatch, script, option):
    """Told before anything starts."""
    monkeypatch.setattr("serve.server.find_spec", lambda package: None if package == "vllm" else package)
    required = ["--prompt", "x"] if script is ask else ["--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"error: {option} vllm needs vllm, which is not installed"):
        script.main(["--model", str(folder), *required, option, "vllm"])
