# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Compares what two folders' models compute, one layer in memory at a time.

Both are loaded as whoever uses them loads them, by `from_pretrained`: it finds and reads the configuration and the
files. Neither the conversion's tables nor its way of reading take part, so a fault of theirs shows.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, FineGrainedFP8Config, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from .checkpoint import ConversionError, shorten, stored_dtype
from .sample_text import TEXT


RELATIVE_TOLERANCE = 1e-4
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


class Batch(NamedTuple):
    """Token ids (B, S), the mask of those that are no padding (B, S), where they come from, and whether they are of a
    text, which models predict, or random."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    origin: str
    is_text: bool

    @property
    def targets(self) -> torch.Tensor:
        """What follows every token that is no padding, (tokens,); -100 after the last one of a row."""
        following = self.input_ids.roll(-1, dims=1)
        following[:, -1] = -100
        return following[self.attention_mask.bool()]


@dataclass(frozen=True)
class Verification:
    """What the comparison of two models' logits found, over all tokens that are no padding, and the perplexity of both
    where these are of a text."""

    tokens: int
    text: str
    max_abs_difference: float
    mean_abs_difference: float
    max_abs_logit: float
    argmax_agreement: float
    tolerance: float
    source_perplexity: float | None = None
    perplexity: float | None = None

    @property
    def passed(self) -> bool:
        """Whether no logit differs by more than the tolerance (a NaN does)."""
        return self.max_abs_difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens ({self.text}): difference max {self.max_abs_difference:.2e}, mean "
            f"{self.mean_abs_difference:.2e}; largest logit {self.max_abs_logit:.3g}; argmax agreement "
            f"{self.argmax_agreement:.2%}; tolerance {self.tolerance:.2e}"
        )


def make_batch(folder: Path, config: PreTrainedConfig, tokens: int, text: str | None, seed: int = 0) -> Batch:
    """Tokens of a text, with the tokenizer of a folder, or random ones where there is none. Rows are left-padded, the
    last one for sure, unless there are too few tokens for two.

    Args:
        folder: Where the tokenizer is.
        config: Of the model: vocabulary and longest sequence.
        tokens: How many, of all rows together. A shorter text is repeated.
        text: `None` for the package's own.
        seed: Of random ids.

    Raises:
        ConversionError: The text is empty, or the tokenizer is not this model's.
    """
    if any((folder / name).exists() for name in _TOKENIZER_FILES):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            ids = tokenizer(TEXT if text is None else text)["input_ids"]
        except Exception as error:  # of whatever library made the files
            if text is not None:
                raise ConversionError(
                    f"`--verify-text`: the source's tokenizer does not load ({error}). Correct it or leave this out."
                ) from error
            ids, origin = None, "random ids, since the tokenizer does not load without its own code"
        else:
            origin = "the package's text" if text is None else "the given text"
            if not ids:
                raise ConversionError("`--verify-text`: the text has no tokens. Choose another.")
            if max(ids) >= config.vocab_size:
                raise ConversionError(
                    f"The tokenizer has the id {max(ids)}, beyond `vocab_size={config.vocab_size}`: it is not this "
                    "model's, or config.json is wrong. Correct either."
                )
    elif text is None:
        ids, origin = None, "random ids, since there is no tokenizer"
    else:
        raise ConversionError("`--verify-text`: the source has no tokenizer for it. Leave it out.")
    if not (is_text := ids is not None):
        ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = (ids * math.ceil(tokens / len(ids)))[:tokens]

    length = tokens if tokens < 4 else math.ceil(2 * tokens / 3)
    length = min(length, config.max_position_embeddings)
    rows = [ids[start : start + length] for start in range(0, tokens, length)]
    return Batch(
        # Padding is masked: any token will do.
        torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        origin,
        is_text,
    )


def compare(
    source: Path,
    result: Path,
    batch: Batch,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    on_read: Callable[[int], object] = lambda nbytes: None,
    source_class: type[PreTrainedModel] | None = None,
) -> Verification:
    """Runs both models in float32 and compares their logits.

    Args:
        source: The folder of the one model.
        result: That of the other.
        batch: The tokens.
        dtype: What the source's tensors are rounded to first: what the result is stored as, if that is another. What
            weights in FP8 stand for is rounded in any case, to the dtype of the configuration by default.
        tolerance: Largest difference; by default `1e-4 * max(1, largest logit)`.
        on_read: Called with the size of every tensor that is read.
        source_class: Of the source's model, where transformers does not know it.

    Raises:
        ConversionError: transformers cannot load or run one of them.
    """
    expected = _checked_logits("source", source, batch, dtype, on_read, source_class)
    actual = _checked_logits("result", result, batch, None, on_read)
    perplexities = [_perplexity(logits, batch) for logits in (expected, actual)]
    largest = expected.abs().max().item()
    agreement = (expected.argmax(-1) == actual.argmax(-1)).float().mean().item()
    difference = actual.sub_(expected).abs_()
    return Verification(
        tokens=len(expected),
        text=batch.origin,
        max_abs_difference=difference.max().item(),
        mean_abs_difference=difference.mean().item(),
        max_abs_logit=largest,
        argmax_agreement=agreement,
        tolerance=RELATIVE_TOLERANCE * max(1.0, largest) if tolerance is None else tolerance,
        source_perplexity=perplexities[0],
        perplexity=perplexities[1],
    )


def _perplexity(logits: torch.Tensor, batch: Batch) -> float | None:
    targets = batch.targets
    if not batch.is_text or (targets == -100).all():
        return None
    # In pieces: the whole would be converted to probabilities at once.
    pieces = zip(logits.split(256), targets.split(256), strict=True)
    loss = sum(F.cross_entropy(*piece, ignore_index=-100, reduction="sum").item() for piece in pieces)
    return math.exp(loss / (targets != -100).sum().item())


@torch.no_grad()
def mean_mlp_inputs(folder: Path, batch: Batch) -> dict[int, torch.Tensor]:
    """Means (H,) in float32, over the tokens that are no padding, of what the MLP of every layer reads.

    Raises:
        ConversionError: transformers cannot load or run the model.
    """
    means: dict[int, torch.Tensor] = {}

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...], layer_idx: int) -> None:
        means[layer_idx] = args[0][batch.attention_mask.bool()].mean(0)

    with _explained("source"), _quiet_loading():
        model = _load_on_demand(folder)
        for layer_idx, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(partial(keep, layer_idx=layer_idx))
        model.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return means


@contextmanager
def _explained(what: str):
    """Errors of loading and running a model, which name it and the remedy."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"Verification failed. The {what}: {error}") from error
    except Exception as error:  # of whatever part of transformers, which the message must name
        raise ConversionError(
            f"Verification failed. transformers {transformers.__version__} cannot run the {what}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}. Correct config.json or the weights."
        ) from error


def _checked_logits(what: str, folder: Path, batch: Batch, *arguments) -> torch.Tensor:
    with _explained(what):
        logits = compute_logits(folder, batch, *arguments)
    if not logits.isfinite().all():
        raise ConversionError(
            f"Verification failed. Logits of the {what} are not finite in transformers {transformers.__version__}: "
            "correct config.json or the weights."
        )
    return logits


@torch.no_grad()
def compute_logits(
    folder: Path,
    batch: Batch,
    dtype: torch.dtype | None = None,
    on_read: Callable[[int], object] = lambda nbytes: None,
    model_class: type[PreTrainedModel] | None = None,
) -> torch.Tensor:
    """Logits (tokens that are no padding, vocabulary) in float32 of a folder's model, as `from_pretrained` loads it
    but never in memory as a whole. The class is transformers' own for its configuration, unless one is given."""
    with _quiet_loading():
        model = _load_on_demand(folder, dtype, on_read, model_class)
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return logits[batch.attention_mask.bool()]


def _load_config(folder: Path) -> PreTrainedConfig:
    """A folder's configuration. Where `model_type` is that of code beside the weights, transformers is asked for the
    type of the class that `architectures` names."""
    values, _ = PreTrainedConfig.get_config_dict(folder)
    named = {}
    if values["model_type"] not in CONFIG_MAPPING:
        named["model_type"] = getattr(transformers, values["architectures"][0]).config_class.model_type
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, **named)


def _load_on_demand(
    folder: Path,
    dtype: torch.dtype | None = None,
    on_read: Callable[[int], object] = lambda nbytes: None,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    config, options = _load_config(folder), {}
    if getattr(config, "quantization_config", None):
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    model_class = model_class or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = _on_demand(model_class, dtype, config.dtype or torch.bfloat16, on_read)
    return model_class.from_pretrained(folder, config=config, dtype=torch.float32, **options)


def _on_demand(
    model_class: type[PreTrainedModel], dtype: torch.dtype | None, fp8_dtype: torch.dtype, on_read: Callable
) -> type[PreTrainedModel]:
    """A model class whose `from_pretrained` leaves the weights where they are: embedding, layers, norm and head are
    read when they are called, and dropped afterwards. Tensors are rounded to `dtype`, and what weights in FP8 stand
    for to that or `fp8_dtype`."""

    def load(model, state_dict, checkpoint_files, load_config: LoadStateDictConfig):
        tensors: dict[str, _LazyTensor] = {}
        for file in checkpoint_files:
            # Not memory-mapped: mapped pages would count as this process' memory until the file is closed.
            opened = safe_open(file, framework="pt", backend="pread")
            keys = opened.keys()
            tensors |= {key: _LazyTensor(opened, key, dtype, on_read) for key in keys}
        if load_config.hf_quantizer is not None:
            block = load_config.hf_quantizer.quantization_config.weight_block_size
            for key in [key for key in tensors if key.endswith("_scale_inv")]:
                weight = tensors[key.removesuffix("_scale_inv")]
                tensors[key] = _LazyScales(tensors[key].file, key, None, on_read, shape=weight.shape, block=block)
        read = partial(model_class._load_pretrained_model, model, checkpoint_files=None, load_config=load_config)
        _add_hooks(model, tensors, load_config.weight_mapping or [], read, dtype or fp8_dtype)
        info, _ = read({})
        info.missing_keys.clear()  # they are yet to come
        return info, None

    # transformers looks for properties of a class in its module, and for rules of renaming by its name.
    names = {"__module__": model_class.__module__, "_load_pretrained_model": staticmethod(load)}
    return type(model_class.__name__, (model_class,), names)


def _add_hooks(
    model: PreTrainedModel,
    tensors: dict[str, "_LazyTensor"],
    mapping: list,
    read: Callable,
    fp8_dtype: torch.dtype,
) -> None:
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    layers = {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    blocks = {"model.embed_tokens": model.model.embed_tokens, **layers}
    blocks |= {"model.norm": model.model.norm, "lm_head": model.lm_head}
    keys: dict[str, list[str]] = defaultdict(list)
    dequantized: dict[str, set[str]] = defaultdict(set)
    for key in tensors:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name in state:
            block = next(block for block in blocks if name.startswith(f"{block}."))
            keys[block].append(key)
            if tensors[key].is_fp8:
                dequantized[block].add(name)
    if model.config.tie_word_embeddings:
        keys["lm_head"] = keys["model.embed_tokens"]

    def load(block: str, module: nn.Module) -> None:
        info, _ = read({key: tensors[key] for key in keys[block]})
        if block == "lm_head" and model.config.tie_word_embeddings:
            model.tie_weights()
        problems = [*info.conversion_errors.values(), *info.error_msgs]
        problems += [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in info.mismatched_keys]
        loaded = [*module.named_parameters(), *module.named_buffers()]
        problems += [f"{block}.{name} is missing" for name, tensor in loaded if tensor.is_meta]
        if problems:
            raise ConversionError(
                f"transformers cannot load {block} as `{model.config.model_type}`: {shorten(problems)}."
            )
        module.float()  # before 5.24, what is stored beside weights in FP8 keeps its dtype
        for name in dequantized[block]:
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.to(fp8_dtype))

    def drop(module: nn.Module, *_) -> None:
        module.to("meta")

    for block, module in blocks.items():
        module.register_forward_pre_hook(lambda module, _, block=block: load(block, module))
        module.register_forward_hook(drop)


class _LazyTensor:
    """A tensor of a file that is read, and rounded, when transformers' loading code asks for it."""

    def __init__(self, file: safe_open, key: str, dtype: torch.dtype | None, on_read: Callable):
        self.file, self.key, self.dtype, self.on_read = file, key, dtype, on_read

    @property
    def shape(self) -> list[int]:
        return self.file.get_slice(self.key).get_shape()

    @property
    def is_fp8(self) -> bool:
        return self.get_dtype().startswith("F8")

    def get_dtype(self) -> str:
        return self.file.get_slice(self.key).get_dtype()

    def __getitem__(self, _) -> torch.Tensor:
        tensor = self.file.get_tensor(self.key)
        self.on_read(tensor.nbytes)
        return tensor if self.is_fp8 else tensor.to(stored_dtype(self.key, tensor.dtype, self.dtype))


class _LazyScales(_LazyTensor):
    """Scales of a weight's blocks, for as many smaller blocks that none of them is cut off: transformers takes a block
    to be the weight's size over the number of its scales."""

    def __init__(self, *arguments, shape: list[int], block: Sequence[int]):
        super().__init__(*arguments)
        self.weight_shape, self.block = shape, block

    def __getitem__(self, _) -> torch.Tensor:
        scales = super().__getitem__(_)
        for dim, (size, block) in enumerate(zip(self.weight_shape, self.block, strict=True)):
            smaller = math.gcd(size, block)
            scales = scales.repeat_interleave(block // smaller, dim).narrow(dim, 0, size // smaller)
        return scales


@contextmanager
def _quiet_loading():
    """Without transformers' progress bar for every layer."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
