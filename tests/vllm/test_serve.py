"""`examples/serve/` with vLLM, beside transformers."""

from serve import ask, load

from ..test_serve import check_load


EAGER = "--dtype float32 --enforce-eager"


def test_ask(chain_folder, capsys):
    """The answer is the one that transformers' server gives."""
    words = ["--model", str(chain_folder), "--prompt", "2 + 3", "--max-tokens", "8"]
    ask.main([*words, "--engine", "transformers"])
    expected = capsys.readouterr().out
    ask.main([*words, "--engine", "vllm", f"--engine-args={EAGER}"])
    assert capsys.readouterr().out == expected != "\n"


def test_load(chain_folder, tmp_path, capsys):
    options = ["--clients", "2", "--requests", "3", "--max-tokens", "4", "--shots", "0"]
    load.main(["--model", str(chain_folder), "--output-dir", str(tmp_path), f"--vllm-args={EAGER}", *options])
    check_load(tmp_path, [("vllm", 2), ("transformers", 2)], capsys.readouterr().out)
