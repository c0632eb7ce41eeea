# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What a source family is: a table of names and rules, and how it is read in both directions."""

import copy
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, cache_utils, masking_utils, modeling_utils
from transformers import modeling_rope_utils as rope_utils
from transformers.generation import configuration_utils as generation_configuration
from transformers.generation import utils as generation_utils
from transformers.integrations import eager_paged, flash_attention, moe, sdpa_attention
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from configuration_coe import CoeConfig

from .checkpoint import ConversionError


# Fields that every family calls as `CoeConfig` does; those that a family does not have are skipped.
COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
    "output_router_logits",
    "pretraining_tp",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
# Fields of the source that cannot change what the model computes and are not carried over.
HARMLESS_FIELDS = (
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "ep_size",
    "id2label",
    "ignore_keys_at_rope_validation",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
)
# What all models of transformers share and where it reads their configurations.
_SHARED_MODULES = (
    cache_utils,
    masking_utils,
    modeling_utils,
    rope_utils,
    generation_configuration,
    generation_utils,
    eager_paged,
    flash_attention,
    moe,
    sdpa_attention,
)
_DROPPED_KEYS = {r"rotary_emb\.inv_freq$": "computed from the config"}
# What may differ between a chain and the family that it goes back to: how it is trained and stored.
_TRAINING_FIELDS = (
    *HARMLESS_FIELDS,
    "aux_loss_alpha",
    "seq_aux",
    "router_z_loss_coef",
    "output_router_logits",
    "save_routing_logits",
    "dtype",
)


@dataclass(frozen=True)
class Family:
    """A family of source models, as declarations.

    Args:
        model_type: The `model_type` of its `config.json` and of transformers.
        backbone: The `CoeConfig.backbone` with the same attention, rotary embedding and norms.
        same: Fields of its config that `CoeConfig` has under the same name, beyond `COMMON_FIELDS`.
        renamed: Fields of its config -> fields of `CoeConfig` with the same meaning.
        constants: Fields of `CoeConfig` that the family's architecture fixes.
        computed: Fields of `CoeConfig` to be computed from the source's config.
        derived: Fields of the source's config to be computed from a `CoeConfig`, on the way back.
        required: Fields of the source with the only value that can be kept: that which its code in transformers
            implements without reading the field, or a chain has. A field of `rope_parameters` has a dotted name.
        implied: Fields of the source that follow from others.
        left_out: Fields of the source that mean something and have no counterpart -> why that does not matter.
        keys: Names of the source's tensors -> names of a chain's, where they differ (`*`: a number). A router is
            called `mlp.gate` here, whatever the number of iterations.
        rows: Vectors that the source stores as matrices of one row, by the ends of their names there.
        dropped_keys: Patterns of tensors that are dropped on purpose -> why.
        equal_backbones: Other backbones that compute the same where their fields are those that the family can have.
            What is built on one can go back to this family too.
        dense: The family has no experts: its MLPs are made into some (`--upcycle`), and there is no way back.
        aliases: Other `model_type`s of the same architecture, those of code beside the weights. transformers does not
            know them; `architectures` names the class that it has for them.
    """

    model_type: str
    backbone: str
    same: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    computed: dict[str, Callable[[PreTrainedConfig], Any]] = field(default_factory=dict)
    derived: dict[str, Callable[[CoeConfig], Any]] = field(default_factory=dict)
    required: dict[str, Any] = field(default_factory=dict)
    implied: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    dropped_keys: dict[str, str] = field(default_factory=dict)
    equal_backbones: tuple[str, ...] = ()
    dense: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, str]:
        """All fields of the source's config with a counterpart in `CoeConfig`, and that."""
        return {name: name for name in (*COMMON_FIELDS, *self.same)} | self.renamed

    @property
    def fuses_experts(self) -> bool:
        """Whether its files hold all experts of a layer in one tensor."""
        return "mlp.experts.down_proj" in self.keys.values()

    def source_field(self, name: str, config: PreTrainedConfig) -> str | None:
        """What config.json calls a field of `CoeConfig`, `None` where the family has no such field."""
        names = {chain: source for source, chain in self.fields.items()}
        names |= {name: name for name in (*self.required, *self.derived)}
        names.setdefault("moe_intermediate_size", "intermediate_size")  # where all MLPs are of one width
        if name not in names or not hasattr(config, names[name]):
            return None
        return config.attribute_map.get(names[name], names[name])

    def chain_key(self, key: str) -> str:
        """The name that a tensor of the source has in a chain."""
        return _rename(key, self.keys.items())

    def source_key(self, key: str) -> str:
        """The name that a tensor of a chain has in the source."""
        return _rename(key, ((chain, source) for source, chain in self.keys.items()))

    def is_row(self, key: str) -> bool:
        """Whether a tensor of the source is a vector, stored as a matrix of one row."""
        return any(key.endswith(f".{name}") for name in self.rows)

    def dropped(self, key: str, config: PreTrainedConfig) -> str | None:
        """Why a tensor of the source is left out, `None` where it is not."""
        for pattern, reason in (_DROPPED_KEYS | self.dropped_keys).items():
            if match := re.search(pattern, key):
                if not match.groups():
                    return reason
                # The group is a layer: those that predict further tokens follow on the model's own.
                further_layers = range(getattr(config, "num_nextn_predict_layers", None) or 0)
                if int(match[1]) - config.num_hidden_layers in further_layers:
                    return reason
        return None

    def chain_fields(
        self, config: PreTrainedConfig, ignored: tuple[str, ...] = ()
    ) -> tuple[dict[str, Any], list[str]]:
        """Fields of the `CoeConfig` with one iteration that computes what the source does, and remarks on what is
        different outside of that.

        Args:
            config (`PreTrainedConfig`): The source's.
            ignored (`tuple[str, ...]`): Fields that need not be understood.

        Raises:
            ConversionError: The source's config has a field that is not understood and may change its function.
        """
        unread = self._check_understood(config, ignored)
        values = {chain: getattr(config, name) for name, chain in self.fields.items() if hasattr(config, name)}
        values |= self.constants | {name: compute(config) for name, compute in self.computed.items()}
        remarks = [
            f"`{name}={getattr(config, name)}` of the source is not carried over: {reason}."
            for name, reason in self.left_out.items()
            if getattr(config, name, None)
        ]
        remarks += [
            f"{field} of the source is not carried over: "
            + ("it was to be ignored." if name in ignored else f"transformers' `{self.model_type}` does not read it.")
            for name, field in unread.items()
        ]
        return copy.deepcopy({"backbone": self.backbone, **values}), remarks

    def source_config(self, config: CoeConfig) -> PreTrainedConfig:
        """The family's own config for a chain of one iteration.

        Raises:
            ConversionError: The family cannot express the model; the message names the fields.
        """
        if "n_shared_experts" in self.fields and config.n_shared_experts is None:
            config = CoeConfig(**config.to_dict() | {"n_shared_experts": 0})  # as these families say it
        config_class = CONFIG_MAPPING[self.model_type]
        known = {attribute for base in config_class.__mro__ for attribute in getattr(base, "__annotations__", ())}
        values = {
            name: getattr(config, chain)
            for name, chain in self.fields.items()
            if hasattr(config, chain) and (name in known or name not in COMMON_FIELDS)
        }
        values |= {name: value for name, value in self.required.items() if "." not in name}
        values |= {name: compute(config) for name, compute in self.derived.items()}
        for name, value in values.items():
            if isinstance(value, int) and isinstance(getattr(config_class, name, None), float):
                values[name] = float(value)  # which the families' classes insist on
        try:
            source = config_class(**copy.deepcopy(values))
        except (ValueError, StrictDataclassError) as error:
            message = " ".join(str(error).split())
            raise ConversionError(
                f"transformers' `{self.model_type}` cannot express this model: {message}. Correct config.json, if it "
                "is wrong."
            ) from error
        back = CoeConfig(**self.chain_fields(source)[0], inner_iter=1, prenorm_residual=True).to_dict()
        wrong = [
            f"`{name}={value}` (`{self.model_type}` means {back.get(name)})"
            for name, value in config.to_dict().items()
            if name not in _TRAINING_FIELDS and not name.startswith("_") and value != back.get(name)
        ]
        if wrong:
            raise ConversionError(f"transformers' `{self.model_type}` cannot express this model: {', '.join(wrong)}.")
        return source

    def _check_understood(self, config: PreTrainedConfig, ignored: tuple[str, ...]) -> dict[str, str]:
        """Fields that nobody reads, or that are to be ignored, with their values as text."""
        for name, value in self.required.items():
            found = _lookup(config, name, value)
            if found not in (None, value):
                raise ConversionError(
                    f"`{name}` of the source is {found!r}. Only {value!r} can be kept of transformers' "
                    f"`{self.model_type}`. Correct config.json, if it is wrong."
                )
        understood = {
            *self.fields,
            *self.derived,
            *self.required,
            *self.implied,
            *self.left_out,
            *HARMLESS_FIELDS,
        }
        understood |= {config.attribute_map.get(name, name) for name in understood}
        others = {
            name: f"`{name}={value!r}`"
            for name, value in config.to_dict().items()
            if name not in understood and not name.startswith("_") and value != _default(config, name)
        }
        unknown = [field for name, field in others.items() if name not in ignored and _is_read(config, name)]
        if unknown:
            raise ConversionError(
                f"The source's config has fields that the conversion from `{self.model_type}` does not know and that "
                f"may change what the model computes: {', '.join(unknown)}. Name those that do not in "
                "`--ignore-fields`."
            )
        return others


def _lookup(config: PreTrainedConfig, name: str, default: Any) -> Any:
    """The value of a field, or by a dotted name of a field's entry."""
    field, _, entry = name.partition(".")
    value = getattr(config, field, default)
    return (value or {}).get(entry, default) if entry else value


def _is_read(config: PreTrainedConfig, name: str) -> bool:
    """Whether transformers' code of a model, or what all models share, has a field's name as a word."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    modules = (sys.modules[model_class.__module__], *_SHARED_MODULES)
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", inspect.getsource(module)) for module in modules)


def _default(config: PreTrainedConfig, name: str) -> Any:
    """The default that the class of a configuration declares for a field, `None` where there is none."""
    declared = {field.name: field for field in dataclasses.fields(config)}.get(name)
    if declared is None or declared.default is not dataclasses.MISSING:
        return declared and declared.default
    return None if declared.default_factory is dataclasses.MISSING else declared.default_factory()


def _rename(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if (pattern := _end_of_key(old)).search(key):
            return pattern.sub(new.replace("*", r"\1"), key)
    return key


@cache
def _end_of_key(name: str) -> re.Pattern:
    """Of a key's last parts, where `*` is a number."""
    return re.compile(r"(?<![^.])" + re.escape(name).replace(r"\*", r"(\d+)") + "$")
