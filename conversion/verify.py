# Copyright 2026 The CoE Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Compares what two checkpoints compute, one layer in memory at a time.

Both are run by transformers' model classes and read by its own loading code. The tables of the conversion take no
part, so a wrong table shows.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from .checkpoint import Checkpoint, ConversionError, shorten, stored_dtype
from .sample_text import TEXT


RELATIVE_TOLERANCE = 1e-4
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


class Batch(NamedTuple):
    """Token ids (B, S), the mask of those that are no padding (B, S), and where they come from."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    origin: str


@dataclass(frozen=True)
class Verification:
    """What the comparison of two models' logits found, over all tokens that are no padding."""

    tokens: int
    text: str
    max_abs_difference: float
    mean_abs_difference: float
    max_abs_logit: float
    argmax_agreement: float
    tolerance: float

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
                raise ConversionError(f"The source's tokenizer does not load ({error}).") from error
            ids, origin = None, "random ids, since the tokenizer does not load without its own code"
        else:
            origin = "the package's text" if text is None else "the given text"
            if not ids:
                raise ConversionError("The text to verify on has no tokens.")
            if max(ids) >= config.vocab_size:
                raise ConversionError(
                    f"The tokenizer has the id {max(ids)}, beyond `vocab_size={config.vocab_size}`: it is not this "
                    "model's, or config.json is wrong."
                )
    elif text is None:
        ids, origin = None, "random ids, since there is no tokenizer"
    else:
        raise ConversionError("The source has no tokenizer for the text to verify on.")
    if ids is None:
        ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = (ids * math.ceil(tokens / len(ids)))[:tokens]

    length = tokens if tokens < 4 else math.ceil(2 * tokens / 3)
    length = min(length, config.max_position_embeddings)
    rows = [ids[start : start + length] for start in range(0, tokens, length)]
    padding = config.pad_token_id if config.pad_token_id is not None else 0
    return Batch(
        torch.tensor([[padding] * (length - len(row)) + row for row in rows]),
        torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        origin,
    )


def compare(
    source: Checkpoint,
    source_config: PreTrainedConfig,
    result: Checkpoint,
    result_config: PreTrainedConfig,
    batch: Batch,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    on_read: Callable[[int], object] = lambda nbytes: None,
) -> Verification:
    """Runs both models in float32 and compares their logits.

    Args:
        source, source_config: The one model.
        result, result_config: The other.
        batch: The tokens.
        dtype: What the source's tensors are rounded to first: what the result is stored as, if that is another.
        tolerance: Largest difference; by default `1e-4 * max(1, largest logit)`.
        on_read: Called with the size of every tensor that is read.

    Raises:
        ConversionError: transformers cannot load one of them.
    """
    expected = compute_logits(source, source_config, batch, dtype, on_read)
    actual = compute_logits(result, result_config, batch, None, on_read)
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
    )


@torch.no_grad()
def compute_logits(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    batch: Batch,
    dtype: torch.dtype | None = None,
    on_read: Callable[[int], object] = lambda nbytes: None,
) -> torch.Tensor:
    """Logits (tokens that are no padding, vocabulary) in float32 of a model that is never in memory as a whole."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    # Not in the checkpoint: computed from the config.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    with _quiet_loading():
        _load_on_demand(model, checkpoint, dtype, on_read)
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return logits[batch.attention_mask.bool()]


def _load_on_demand(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype | None, on_read) -> None:
    """Hooks that load embedding, layers, norm and head when they are called, and drop them afterwards."""
    mapping = get_model_conversion_mapping(model)
    load_config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=mapping)
    renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]
    state = model.state_dict()
    layers = {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    blocks = {"model.embed_tokens": model.model.embed_tokens, **layers}
    blocks |= {"model.norm": model.model.norm, "lm_head": model.lm_head}
    keys: dict[str, list[str]] = defaultdict(list)
    for key in checkpoint.tensors:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name in state:
            keys[next(block for block in blocks if name.startswith(f"{block}."))].append(key)
    if model.config.tie_word_embeddings:
        keys["lm_head"] = keys["model.embed_tokens"]

    def load(block: str, module: nn.Module) -> None:
        tensors = {key: _LazyTensor(checkpoint, key, dtype, on_read) for key in keys[block]}
        info, _ = type(model)._load_pretrained_model(model, tensors, None, load_config)
        if block == "lm_head" and model.config.tie_word_embeddings:
            model.tie_weights()
        problems = [*info.conversion_errors.values(), *info.error_msgs]
        problems += [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in info.mismatched_keys]
        tensors = [*module.named_parameters(), *module.named_buffers()]
        problems += [f"{block}.{name} is missing" for name, tensor in tensors if tensor.is_meta]
        if problems:
            raise ConversionError(
                f"transformers cannot load {block} of {checkpoint.folder.name} as `{model.config.model_type}`: "
                f"{shorten(problems)}."
            )

    def drop(module: nn.Module, *_) -> None:
        module.to("meta")

    for block, module in blocks.items():
        module.register_forward_pre_hook(lambda module, _, block=block: load(block, module))
        module.register_forward_hook(drop)


class _LazyTensor:
    """A tensor of a checkpoint that is read, and rounded, when transformers' loading code asks for it."""

    def __init__(self, checkpoint: Checkpoint, key: str, dtype: torch.dtype | None, on_read):
        self.checkpoint, self.key, self.dtype, self.on_read = checkpoint, key, dtype, on_read

    def __getitem__(self, _) -> torch.Tensor:
        tensor = self.checkpoint.read(self.key)
        self.on_read(tensor.nbytes)
        return tensor.to(stored_dtype(self.key, tensor.dtype, self.dtype))


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
