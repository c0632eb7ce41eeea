# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Command line of `coe-convert`."""

import argparse
import ctypes
import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from .checkpoint import ConversionError, parse_size
from .converter import convert, existing_parent
from .errors import kind_and_message
from .families import FAMILIES
from .plan import Options
from .planner import plan_conversion
from .report import describe, describe_cost, describe_families, summarise
from .source import find_source, readable


_MOST_LAYERS = 10_000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `coe-convert`. Returns 0, or 1 where the conversion cannot be done; wrong usage exits with 2."""
    args = _parser().parse_args(arguments)
    _return_freed_memory()
    options = Options(
        to=args.to,
        mode=args.mode,
        iterations=args.iterations,
        layers=args.layers,
        dtype=_DTYPES.get(args.dtype),
        router_noise=args.router_noise,
        iteration_norm=args.iteration_norm,
        seed=args.seed,
        round_top_k=args.round_top_k,
        upcycle=args.upcycle,
        experts=args.experts,
        top_k=args.top_k,
        ignored_fields=tuple(args.ignore_fields.split(",")) if args.ignore_fields else (),
        layout=args.layout,
    )
    try:
        parse_size(args.max_shard_size)
        if args.dry_run:
            found = find_source(args.source, args.revision, args.gguf_file)
            with readable(found, existing_parent(args.out), args.merge_adapter) as source:
                plan = plan_conversion(source.path, options, source.remarks)
                print(describe(plan), describe_cost(plan, existing_parent(args.out)), sep="\n")
            return 0
        report = convert(
            args.source,
            args.out,
            options,
            revision=args.revision,
            gguf_file=args.gguf_file,
            merge_adapter=args.merge_adapter,
            verify_tokens=args.verify,
            verify_text=None if args.verify_text is None else _read(args.verify_text),
            tolerance=args.tolerance,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            push=args.push,
            progress=True,
        )
    except (ConversionError, OSError) as error:
        print(f"coe-convert: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # a fault of ours, or of a library: whoever mends it needs its place
        place = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"coe-convert: {args.source} was not converted, {kind_and_message(error)} (in "
            f"{place.name}, line {place.lineno} of {Path(place.filename).name}). Please report this line with "
            "config.json.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("coe-convert: interrupted, nothing was kept.", file=sys.stderr)
        return 1
    print(summarise(report))
    print(f"written to {args.out}" + (f" and uploaded to {args.push}" if args.push else ""))
    return 0


def _return_freed_memory() -> None:
    """Makes glibc return all memory of 128 KB and more when it is freed. By default that limit rises as such memory is
    freed, and dropped weights stay in the heap in pieces that the next ones do not fit."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold = -3
        libc.mallopt(mmap_threshold, 128 * 1024)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coe-convert",
        description="Converts a mixture of experts to a Chain-of-Experts model that computes the same function, and "
        "verifies that it does.",
        epilog=f"Families: {', '.join(FAMILIES)}. Chain-of-Experts models go back with --to.",
    )
    parser.add_argument(
        "--list", action=_ListFamilies, help="what can be converted, and what of it is kept; then exit"
    )
    parser.add_argument("source", metavar="SOURCE", help="a local folder or GGUF file, or a repository of the Hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument(
        "--to",
        choices=("coe", "source", "official"),
        default="coe",
        help="what to make: a chain (default); of a chain, its source family's model, or the official layout",
    )
    parser.add_argument(
        "--mode",
        choices=("identity", "refine", "split"),
        help="split (default): the source's experts spread over the iterations, at its cost; refine: the whole layer "
        "in every iteration; identity: one iteration",
    )
    parser.add_argument("--iterations", type=_positive, metavar="C", help="iterations of a chain (2)")
    parser.add_argument("--layers", type=_layers, help="layers to convert, such as 4-20,22 (all)")
    parser.add_argument("--dtype", choices=_DTYPES, help="what to store weights as (as they are)")
    parser.add_argument(
        "--router-noise",
        type=_not_negative,
        default=0.0,
        metavar="STD",
        help="noise on the routers of later iterations",
    )
    parser.add_argument(
        "--iteration-norm", action="store_true", help="give every iteration a norm of its own, at first the layer's"
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and new routers")
    parser.add_argument(
        "--round-top-k", action="store_true", help="let split change the experts per token to a multiple of C"
    )
    parser.add_argument(
        "--ignore-fields",
        metavar="A,B",
        help="fields of the source's config.json that are not known here and do not change what the model computes",
    )
    source = parser.add_argument_group("sources")
    source.add_argument("--revision", help="branch, tag or commit of the repository")
    source.add_argument("--gguf-file", metavar="FILE", help="read this GGUF file of SOURCE, dequantised")
    source.add_argument(
        "--merge-adapter", action="store_true", help="merge the adapter in SOURCE into its base model first"
    )
    dense = parser.add_argument_group("dense sources")
    dense.add_argument(
        "--upcycle", choices=("copy", "slice"), help="make experts of an MLP: copies of it, or slices along its width"
    )
    dense.add_argument("--experts", type=_positive, metavar="N", help="number of experts (8)")
    dense.add_argument("--top-k", type=_positive, metavar="K", help="experts per token (2 copies, all slices)")
    verification = parser.add_argument_group("verification, which is always done")
    verification.add_argument("--verify", type=_positive, default=256, metavar="N", help="number of tokens (256)")
    verification.add_argument("--verify-text", type=Path, metavar="FILE", help="text to take them from")
    verification.add_argument("--tolerance", type=_not_negative, help="largest difference (1e-4 of the largest logit)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--layout",
        choices=("experts", "fused"),
        help="how a chain's experts are stored: one tensor each, or fused, which loads fastest (as in the source)",
    )
    output.add_argument("--max-shard-size", default="5GB", help="split larger shards (5GB)")
    output.add_argument("--overwrite", action="store_true", help="replace the model in OUT, once this one is complete")
    output.add_argument("--push", metavar="REPO", help="upload the result to the Hub")
    output.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    return parser


class _ListFamilies(argparse.Action):
    """As argparse's own `--version`: needs no other argument."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        print(describe_families())
        parser.exit()


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return number


def _layers(text: str) -> tuple[int, ...]:
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 4-20,22")
        if int(last or first) >= _MOST_LAYERS:
            raise argparse.ArgumentTypeError(f"{text!r} has layers that no model has")
        layers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"`--verify-text {file}` cannot be read ({error}). Choose a text in UTF-8.") from error
