# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What a dense model becomes with experts: how balanced its new routers are, and how fast it decodes.

    python -m benchmarks.dense_sources --model HuggingFaceTB/SmolLM2-135M-Instruct --name smollm2-135m
    python -m benchmarks.dense_sources --name random     # a small Llama with random weights

Routers: each layer's inputs, over the tokens of `--text`, are routed by every candidate for a new router, with
`--seeds` seeds. The one of the conversion knows the mean over the package's text, not over this one. Dead experts get
no token; the largest load is relative to the mean, at most the number of experts over those of a token; entropy is
relative to that of equal loads.

Decoding: one token with a context of 64, the dense model and chains made of it, alive in one process and run in turn;
the ratio is the median of pairs, CPU time with one thread.
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.markdown import table
from benchmarks.measure import Clock, alternate, describe_machine, spread
from conversion import Options, convert
from conversion.converter import find_source
from conversion.tensors import random_router
from conversion.verify import make_batch, mean_mlp_inputs
from modeling_coe.command_line import check_folder, check_positive, command, parse, setting
from modeling_coe.releases import CACHE


ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 64
CHAINS = {
    "slice, split": Options(upcycle="slice", layout="fused"),
    "slice, one iteration": Options(upcycle="slice", mode="identity", layout="fused"),
    "copy, split": Options(upcycle="copy", layout="fused"),
}


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    model: str | None = setting(None, "folder or Hub repository of a dense model; a random one if not given")
    name: str = setting("random", "of the results' files")
    text: Path = setting(ROOT / "README.md", "that the routers see")
    tokens: int = setting(1024, "of the text")
    experts: int = setting(8, "of a layer")
    top_k: int = setting(2, "experts of a token")
    seeds: int = setting(5, "routers of each kind and layer")
    dtype: str = setting("float32", "of the decoding models", choices=("float32", "bfloat16"))
    pairs: int = setting(9, "of runs, a chain's and the dense model's, for one ratio")
    output: Path = setting(Path("runs/benchmarks"), "folder for the results")


def parse_settings(argv: list[str] | None = None) -> DenseSettings:
    """Reads the command line."""
    settings = parse(DenseSettings, __doc__.splitlines()[0], argv)
    check_positive(settings, "tokens", "experts", "top_k", "seeds", "pairs")
    check_folder("output", settings.output)
    return settings


def random_source(folder: Path) -> Path:
    """A small Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes)).save_pretrained(folder)
    return folder


def token_ids(folder: Path, settings: DenseSettings, vocabulary: int) -> torch.Tensor:
    """(1, tokens) of the text, or random ones where the model has no tokenizer."""
    if not (folder / "tokenizer.json").exists():
        return torch.randint(vocabulary, (1, settings.tokens), generator=torch.Generator().manual_seed(1))
    ids = AutoTokenizer.from_pretrained(folder)(settings.text.read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor([ids[: settings.tokens]])


# ---- Routers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mlp_inputs(model: PreTrainedModel, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """What the MLP of every layer reads, (T, H)."""
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].float()))
        for layer in model.model.layers
    ]
    model(input_ids)
    for hook in hooks:
        hook.remove()
    return inputs


def candidates(noise: torch.Tensor, norm: torch.Tensor, mean: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Routers (N, H) made of normal `noise`, the weight (H,) of the norm before it, and the mean (H,) of its input."""
    yield "zero", torch.zeros_like(noise)
    yield "random", noise
    yield "random, a tenth", 0.1 * noise
    yield "orthogonal rows", torch.linalg.qr(noise.T)[0].T
    yield "random, orthogonal to the norm's weight", random_router(noise, norm)
    yield "random, times the norm's weight", noise * norm
    yield "random, over the norm's weight", noise / norm.where(norm != 0, 1)
    yield "random, orthogonal to the mean input", random_router(noise, mean)


def balance(router: torch.Tensor, inputs: torch.Tensor, top_k: int) -> dict[str, float]:
    """How evenly a router (N, H) spreads inputs (T, H)."""
    chosen = (inputs @ router.T).topk(top_k, dim=-1).indices
    load = torch.bincount(chosen.flatten(), minlength=len(router)) / chosen.numel()
    entropy = torch.special.entr(load).sum() / torch.tensor(float(len(router))).log()
    return {
        "dead": (load == 0).float().mean().item(),
        "largest": (load.max() * len(router)).item(),
        "entropy": entropy.item(),
    }


def measure_routers(
    folder: Path, model: PreTrainedModel, settings: DenseSettings
) -> dict[str, dict[str, list[float]]]:
    """Candidate -> figure -> its mean over the seeds for every layer."""
    inputs = mlp_inputs(model, token_ids(folder, settings, model.config.vocab_size))
    means = mean_mlp_inputs(folder, make_batch(folder, model.config, 256, None))
    results: dict[str, dict[str, list[float]]] = {}
    for layer_idx, layer in enumerate(model.model.layers):
        norm, samples = layer.post_attention_layernorm.weight.detach().float(), {}
        for seed in range(settings.seeds):
            generator = torch.Generator().manual_seed(1000 * seed + layer_idx)
            noise = torch.randn(settings.experts, len(norm), generator=generator)
            for name, router in candidates(noise, norm, means[layer_idx]):
                samples.setdefault(name, []).append(balance(router, inputs[layer_idx], settings.top_k))
        for name, figures in samples.items():
            for figure in figures[0]:
                mean = statistics.mean(sample[figure] for sample in figures)
                results.setdefault(name, {}).setdefault(figure, []).append(mean)
    return results


# ---- Decoding -------------------------------------------------------------------------------------------------------


def decoder(model: PreTrainedModel, clock: Clock, tokens: int = 4) -> Callable[[], float]:
    """Seconds of one token, each time with the same context."""
    ids = torch.randint(model.config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]

    @torch.no_grad()
    def decode() -> None:
        for _ in range(tokens):
            model(ids[:, :1], use_cache=True, **{CACHE: cache})

    def run() -> float:
        seconds = clock(decode) / tokens
        cache.crop(-tokens)
        return seconds

    return run


def measure_decoding(folder: Path, work: Path, settings: DenseSettings) -> dict[str, dict[str, Any]]:
    """Model -> seconds of a token, and its ratios to the dense model's."""
    torch.set_num_threads(1)
    folders = {"dense": folder}
    for name, options in CHAINS.items():
        folders[name] = work / name
        convert(folder, folders[name], options, verify_tokens=16)
    dtype, clock = getattr(torch, settings.dtype), Clock("cpu", 1)
    runs = {
        name: decoder(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval(), clock)
        for name, path in folders.items()
    }
    samples = alternate(runs, settings.pairs, "decode")
    return {
        name: {
            "seconds": seconds,
            "ratios": [one / dense for one, dense in zip(seconds, samples["dense"], strict=True)],
        }
        for name, seconds in samples.items()
    }


# ---- Report ---------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    settings = results["settings"]
    lines = [
        f"# A dense model with experts: {results['name']}",
        "",
        f"{results['parameters']:,} parameters. Routers of {settings['experts']} experts, {settings['top_k']} for a "
        f"token, on {results['tokens']:,} tokens, {settings['seeds']} seeds; mean over the layers, and the worst one.",
        "",
    ]
    rows = []
    for name, figures in results["routers"].items():
        dead, largest, entropy = (figures[figure] for figure in ("dead", "largest", "entropy"))
        rows.append(
            [
                name,
                f"{statistics.mean(dead):.1%}",
                f"{max(dead):.0%}",
                f"{statistics.mean(largest):.2f}",
                f"{max(largest):.2f}",
                f"{statistics.mean(entropy):.3f}",
                f"{min(entropy):.3f}",
            ]
        )
    header = ["router", "dead experts", "worst", "largest load", "worst", "entropy", "worst"]
    lines += table(header, rows)
    machine = results["machine"]
    lines += [
        "",
        f"Decoding in {settings['dtype']}, CPU time of one thread, {settings['pairs']} pairs; {machine['device']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}, {machine['date']}.",
        "",
    ]
    rows = []
    for name, row in results["decoding"].items():
        ratio = spread(row["ratios"])
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(row['seconds']):.1f}",
                f"{ratio.median:.2f}",
                f"{ratio.q1:.2f} to {ratio.q3:.2f}",
            ]
        )
    lines += table(["model", "ms per token", "ratio to dense", "quartiles"], rows)
    return "\n".join(lines) + "\n"


@command
def main(argv: list[str] | None = None) -> dict[str, Any]:
    settings = parse_settings(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = random_source(work / "source") if settings.model is None else find_source(settings.model)[0]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        routers = measure_routers(folder, model, settings)
        results = {
            "name": settings.name,
            "parameters": model.num_parameters(),
            "tokens": token_ids(folder, settings, model.config.vocab_size).numel(),
            "settings": {name: getattr(settings, name) for name in ("experts", "top_k", "seeds", "dtype", "pairs")},
            "machine": describe_machine("cpu", 1, date.today().isoformat()),
            "routers": routers,
            "decoding": measure_decoding(folder, work, settings),
        }
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / f"dense-{settings.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (settings.output / f"dense-{settings.name}.md").write_text(markdown(results))
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
