# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What a conversion will do, and whether every tensor of the source and of the result is accounted for."""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

import modeling_coe  # noqa: F401  registers the Auto classes
from configuration_coe import CoeConfig

from .checkpoint import Checkpoint, ConversionError, Slice, shorten
from .families import FAMILIES


@dataclass(frozen=True)
class Options:
    """What to make of a source.

    Args:
        to: `"coe"`, or back: `"source"` (the family's own class in transformers) or `"official"`.
        mode: `"identity"`, `"refine"` or `"split"` (default).
        iterations: C; 2 by default and 1 for `"identity"`.
        layers: The layers to convert: those that are chained or, of a dense source, that get experts. Default: all.
        dtype: What weights are stored as; as in the source by default.
        router_noise: Standard deviation of what is added to the routers of later iterations.
        iteration_norm: Gives every iteration after the first a norm of its own, at first a copy of the layer's.
        seed: Of that noise, and of new routers.
        round_top_k: Lets `"split"` round the number of experts per token to a multiple of C.
        upcycle: `"copy"` or `"slice"`: how experts are made of the MLPs of a dense source.
        experts: Their number, 8 by default.
        top_k: How many of them a token uses, over all iterations; 2 by default, and all slices.
        ignored_fields: Fields of the source's configuration that need not be understood.
        layout: `"experts"`, one tensor for each expert and projection, or `"fused"`, one for all experts of a layer,
            as they are in memory; as in the source by default.
    """

    to: str = "coe"
    mode: str | None = None
    iterations: int | None = None
    layers: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    router_noise: float = 0.0
    iteration_norm: bool = False
    seed: int = 0
    round_top_k: bool = False
    upcycle: str | None = None
    experts: int | None = None
    top_k: int | None = None
    ignored_fields: tuple[str, ...] = ()
    layout: str | None = None


class Output(NamedTuple):
    """A tensor of the result and the tensor of the source that it is made of, or stored along with."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    rule: str = "copied"
    make: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    slice: Slice | None = None

    @property
    def is_new(self) -> bool:
        return self.rule.startswith("new")

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def stored_name(self) -> str:
        """Of the tensor that is stored, of which this may be a slice."""
        return self.name if self.slice is None else self.slice.whole


@dataclass
class Plan:
    """A conversion before it is done.

    Args:
        checkpoint: The source's weights.
        source_config: Its configuration.
        config: That of the result, a dictionary for the official layout.
        options: With all defaults filled in.
        before: The source as a `CoeConfig`, for its figures.
        after: The result as a `CoeConfig`.
        exact: Whether the result computes what the source does.
        explanation: Why, or why not.
        outputs: What is written, in the order of the source's tensors.
        dropped: Tensors of the source that are left out -> why.
        remarks: What else the user should know.
        source_class: Of the source's model, where transformers does not know it.
        mlp_inputs: Layers of a dense source -> mean (H,) of what their MLPs read, for new routers. A plan is made
            without it; whoever carries it out adds it.
    """

    checkpoint: Checkpoint
    source_config: PreTrainedConfig
    config: PreTrainedConfig | dict[str, Any]
    options: Options
    before: CoeConfig
    after: CoeConfig
    exact: bool
    explanation: str
    outputs: list[Output] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    source_class: type[PreTrainedModel] | None = None
    mlp_inputs: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the result's tensors."""
        return sum(output.nbytes for output in self.outputs)


def drop_tied_head(plan: Plan) -> None:
    """Drops a head that is stored although it is tied, once it is known to be the embedding.

    Raises:
        ConversionError: It is another.
    """
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tensors = plan.checkpoint.tensors
    if plan.source_config.tie_word_embeddings and head in tensors and embedding in tensors:
        if plan.checkpoint.differs(head, embedding):
            raise ConversionError(
                f"`tie_word_embeddings` is true in config.json, but `{head}` is not `{embedding}`. Correct it."
            )
        plan.outputs = [output for output in plan.outputs if output.source != head]
        plan.dropped[head] = f"equal to `{embedding}`, to which it is tied"


def account(plan: Plan) -> None:
    """Compares what is to be written with what the result's class has on disk: the same names and shapes, each from
    one tensor of the source.

    Raises:
        ConversionError: Names the tensors that are missing, too many or of another shape, and the fields to look at.
    """
    config = plan.after if isinstance(plan.config, dict) else plan.config
    expected = _expected_tensors(config, {output.name for output in plan.outputs})
    for output in [output for output in plan.outputs if 0 in output.shape and output.name not in expected]:
        plan.outputs.remove(output)
        plan.dropped[output.source] = "it has no elements"
    produced: dict[str, Output] = {}
    problems = []
    for output in plan.outputs:
        if output.name in produced:
            problems.append(f"`{produced[output.name].source}` and `{output.source}` both become `{output.name}`")
        produced[output.name] = output
    for name, shape in expected.items():
        if 0 in shape and name not in produced:
            empty = torch.empty(shape, dtype=plan.outputs[0].dtype)
            produced[name] = plan.outputs[0]._replace(
                name=name, shape=shape, rule="new: no elements", make=lambda _, empty=empty: empty
            )
            plan.outputs.append(produced[name])
    missing = [name for name in expected if name not in produced]
    surplus = [name for name in produced if name not in expected]
    wrong = [name for name in produced if name in expected and produced[name].shape != expected[name]]
    if missing:
        problems.append(f"nothing becomes {shorten(f'`{name}`' for name in missing)}")
    if surplus:
        problems.append(f"there is no place for {shorten(f'`{produced[name].source}`' for name in surplus)}")
    for name in wrong[:4]:
        source, shape = produced[name].source, produced[name].shape
        problems.append(f"`{source}` makes `{name}` {list(shape)}, where {list(expected[name])} is expected")
    if problems:
        fields = []
        for keys, others in ((missing, _layers(produced)), (surplus, _layers(expected))):
            fields += [field for key in keys for field in _deciding_fields(key, others)]
        for key in wrong:
            # What the tensor has the size of is no reason for its having another.
            sizes = _matching(_SIZES, key)
            fields += [field for field in sizes if getattr(config, field, None) not in produced[key].shape]
        raise ConversionError(
            "The weights do not fit config.json:\n  " + "\n  ".join(problems) + f"\n{_remedy(plan, set(fields))}"
        )


def _remedy(plan: Plan, fields: set[str]) -> str:
    """What to do where some fields of a `CoeConfig` do not fit the weights, in the source's own names."""
    config, family = plan.source_config, FAMILIES.get(plan.source_config.model_type)
    names = [name if family is None else family.source_field(name, config) for name in sorted(fields)]
    values = {name: getattr(config, name) for name in names if name is not None and hasattr(config, name)}
    if not values:
        return "Look whether the source is complete, and of this architecture alone."
    listed = ", ".join(f"`{name}={value!r}`" for name, value in values.items())
    remedy = f"Correct {listed} in config.json, or complete the source."
    if _MTP_LAYERS in values:
        remedy += f" Layers that predict further tokens (MTP) are dropped where `{_MTP_LAYERS}` counts them."
    return remedy


def _expected_tensors(config: PreTrainedConfig, produced: set[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors on disk: one for each expert, fused only where `produced` has them so."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    fused = {name: tensor for name, tensor in state.items() if name in produced}
    split = revert_weight_conversion(model, {name: state[name] for name in state.keys() - fused.keys()})
    return {name: tuple(tensor.shape) for name, tensor in (fused | split).items()}


# Parts of tensors' names -> the fields that decide whether there is such a tensor in a layer.
_EXISTENCE = {
    r"shared_expert": ("n_shared_experts", "shared_expert_intermediate_size"),
    r"e_score_correction_bias$": ("topk_method",),
    r"self_attn\.q_(proj|a_proj|b_proj|a_layernorm)\.weight": ("q_lora_rank",),
    r"self_attn\..*bias$": ("attention_bias", "qkv_bias"),
    r"mlp\..*_proj\.bias$": ("mlp_bias",),
    r"lm_head": ("tie_word_embeddings",),
    r"iteration_scale": ("upcycling", "inner_iter", "chain_layers"),
    r"iteration_norms": ("iteration_norm", "inner_iter", "chain_layers"),
    r"branch_norms": ("branch_norm", "inner_iter", "chain_layers"),
    r"mlp\.gate\.\d": ("inner_iter", "chain_layers"),
}
# Likewise, how large it is.
_SIZES = {
    r"experts\.": ("moe_intermediate_size",),
    r"experts\.(gate_up|up|gate|down)_proj$|gate\.(\d\.)?weight|e_score_correction_bias": ("n_routed_experts",),
    r"shared_expert": ("n_shared_experts", "shared_expert_intermediate_size"),
    r"mlp\.(gate|up|down)_proj": ("intermediate_size",),
    r"self_attn\.[qo]": (
        "num_attention_heads",
        "head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "q_lora_rank",
    ),
    r"self_attn\.[kv]": (
        "num_key_value_heads",
        "head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "kv_lora_rank",
    ),
    r"embed_tokens|lm_head": ("vocab_size",),
    r"iteration_scale": ("inner_iter",),
    r"": ("hidden_size",),
}
# The fields that say which layers have experts, as chains and as families call them.
_SPARSE_LAYERS = (
    *("first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step"),
    *("mlp_layer_types", "moe_layer_end_index"),
)
_MTP_LAYERS = "num_nextn_predict_layers"
_EXPERTS = re.compile(r"\.experts\.|\.gate\.")
_LAYER = re.compile(r"model\.layers\.\d+\.")


def _matching(table: dict[str, tuple[str, ...]], name: str) -> list[str]:
    return [field for pattern, fields in table.items() if re.search(pattern, name) for field in fields]


def _layers(names: Iterable[str]) -> dict[str, bool]:
    """The layers that tensors are of -> whether these have experts."""
    layers: dict[str, bool] = {}
    for name in names:
        if layer := _LAYER.match(name):
            layers[layer[0]] = layers.get(layer[0], False) or bool(_EXPERTS.search(name))
    return layers


def _deciding_fields(name: str, layers: dict[str, bool]) -> list[str]:
    """Fields that decide whether a tensor exists which the other side, that has `layers`, lacks."""
    if (layer := _LAYER.match(name)) and layer[0] not in layers:
        return ["num_hidden_layers", _MTP_LAYERS]
    if layer and re.search(r"\.(mlp|block_sparse_moe)\.", name) and "shared_expert" not in name:
        if bool(_EXPERTS.search(name)) != layers[layer[0]]:
            return list(_SPARSE_LAYERS)
        if ".experts." in name:
            return ["n_routed_experts"]
    return _matching(_EXISTENCE, name)
