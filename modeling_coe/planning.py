# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""`coe-plan`: which layouts of a training run fit a number of devices, and how fast they can be.

Nothing is measured and no device is needed. Weights, gradients and optimizer states are counted tensor by tensor on a
model without storage, cut as the engines cut them. Activations are what autograd keeps of every operation of the model
on a GPU, and of the loss at its largest moment. The time of a step is a roofline: floating-point operations at a part
of the device's peak, bytes between devices at a part of their links' bandwidth.

Layouts, by how many devices share what:

    ddp                   every device has everything: float32 weights, bfloat16 by autocast
    replicate R x fsdp F  FSDP2 of transformers' `DistributedConfig`: F devices share weights, gradients and states
    ... ep E              E devices share the experts and exchange tokens, C times a layer
    ... tp T              T devices share every matrix, and one batch
    zero-3                DeepSpeed: like fsdp over all devices, with bfloat16 and float32 weights

Shapes: T tokens of a micro-batch, H hidden, N experts, K chosen per token and iteration, I expert width, C iterations.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, NamedTuple

import torch

from .command_line import InputError, check_positive, check_range, command, load_config, option, parse, setting
from .configuration_coe import BACKBONES, CoeConfig
from .modeling_coe import CoeForCausalLM


GB = 10**9
UNITS = {"": 1, "M": 10**6, "G": GB, "T": 10**12, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
USABLE = 0.9  # of a device's memory; the rest is the context, communication buffers and gaps between tensors
CLOSE = 0.95  # a layout this close to the fastest is as good, and the simplest of them the best


# ---- Settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """What the devices and their links can do. The defaults are a machine of 8 H100."""

    _argument_group_name: ClassVar[str] = "devices"
    devices: int = setting(8, "number of devices")
    devices_per_node: int = setting(8, "of one machine")
    memory: str = setting("80G", "of one device; G is 10^9 bytes, Gi 2^30")
    peak: float = setting(989.0, "dense bfloat16 products of one device, TFLOP/s")
    peak_float32: float = setting(67.0, "float32 products, TFLOP/s; about half of --peak where TF32 is allowed")
    efficiency: float = setting(0.4, "part of the peak that products reach")
    node_bandwidth: float = setting(450.0, "from one device to those of its machine, GB/s")
    network_bandwidth: float = setting(50.0, "from one device to other machines, GB/s")
    link_efficiency: float = setting(0.8, "part of the bandwidth that transfers reach")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """One step of the optimizer."""

    _argument_group_name: ClassVar[str] = "step"
    batch_size: int = setting(512, "sequences of a step, of all devices together")
    micro_batch_size: int = setting(1, "sequences that a device computes at once")
    sequence_length: int = setting(4096, "tokens of a sequence")
    dtype: str = setting("bfloat16", "of products: mixed precision, or float32", choices=("bfloat16", "float32"))
    gradient_checkpointing: bool = setting(False, "keep the inputs of layers and compute the rest again")


@dataclass(frozen=True, kw_only=True)
class LayoutSettings:
    """One layout instead of all, where any of them is given."""

    _argument_group_name: ClassVar[str] = "layout"
    replicate_size: int | None = setting(None, "copies of the sharded model; 1 if not given")
    fsdp_size: int | None = setting(None, "devices that share a copy; all that the others leave, if not given")
    ep_size: int | None = setting(None, "devices that share the experts; 1 if not given")
    tp_size: int | None = setting(None, "devices that share every matrix; 1 if not given")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(DeviceSettings, StepSettings, LayoutSettings):
    pass


@dataclass(frozen=True, kw_only=True)
class CommandSettings(PlanSettings):
    config: str = setting(
        help="folder, config.json or Hub name of a CoE model; its weights are not read", metavar="CONFIG"
    )


def parse_settings(argv: Sequence[str] | None = None) -> CommandSettings:
    """Reads the command line and checks what can be checked without a model."""
    settings = parse(
        CommandSettings,
        "Plans the training of a Chain-of-Experts model: memory of a device and expected speed of every layout.",
        argv,
        prog="coe-plan",
    )
    check_settings(settings)
    return settings


def check_settings(settings: PlanSettings) -> None:
    """Raises [`InputError`] where options have no meaning, alone or together."""
    check_positive(settings, "devices", "devices_per_node", "batch_size", "micro_batch_size", "sequence_length")
    check_positive(
        settings, *(each.name for each in fields(LayoutSettings) if getattr(settings, each.name) is not None)
    )
    for name in ("peak", "peak_float32", "node_bandwidth", "network_bandwidth"):
        check_range(settings, name, 0, exclusive=True)
    for name in ("efficiency", "link_efficiency"):
        value = getattr(settings, name)
        if not 0 < value <= 1:
            raise InputError(f"{option(name)} is {value}; it must be more than 0, and 1 or less.")
    parse_bytes(settings.memory)
    if settings.devices > settings.devices_per_node and settings.devices % settings.devices_per_node:
        raise InputError(
            f"--devices is {settings.devices}, no multiple of --devices-per-node {settings.devices_per_node}. Give "
            "whole machines."
        )


def parse_bytes(text: str) -> int:
    """Bytes of `80G`, `80GB` or `80GiB`.

    Raises:
        InputError: It is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT]i?|)B?", text.strip())
    if match is None or not float(match[1]):
        raise InputError(f"--memory is {text!r}, which is no size. Give one such as 80G or 80GiB.")
    return int(float(match[1]) * UNITS[match[2]])


# ---- Layouts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How devices share a model. With `"fsdp"`, `replicate_size * fsdp_size * tp_size` of them; within these, groups
    of `ep_size` share the experts."""

    engine: Literal["ddp", "fsdp", "zero-3"]
    replicate_size: int = 1
    fsdp_size: int = 1
    ep_size: int = 1
    tp_size: int = 1

    def __str__(self) -> str:
        if self.engine != "fsdp":
            return self.engine
        sizes = {"replicate": self.replicate_size, "fsdp": self.fsdp_size, "ep": self.ep_size, "tp": self.tp_size}
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "fsdp")

    @property
    def num_batches(self) -> int:
        """Number of micro-batches that the devices compute at once."""
        return self.replicate_size * self.fsdp_size

    @property
    def expert_fsdp_size(self) -> int:
        """Number of devices that share one of the `ep_size` parts of the experts."""
        return self.fsdp_size * self.tp_size // self.ep_size if self.ep_size > 1 else self.fsdp_size


def layouts(config: CoeConfig, settings: PlanSettings) -> Iterator[Layout]:
    """The layouts that the devices and the model divide into, the simplest first, or the one that is asked for.

    Raises:
        InputError: That one does not divide.
    """
    devices, in_node = settings.devices, min(settings.devices, settings.devices_per_node)
    if any(getattr(settings, each.name) is not None for each in fields(LayoutSettings)):
        yield _chosen_layout(config, settings)
        return
    yield Layout("ddp", replicate_size=devices)
    if devices == 1:
        return
    copies = [1] if devices == in_node else [1, devices // in_node]
    yield from (Layout("fsdp", copy, devices // copy) for copy in copies)
    is_mixed = settings.dtype == "bfloat16"
    if is_mixed:  # in float32 DeepSpeed has copies of its own
        yield Layout("zero-3", fsdp_size=devices)
    for copy in copies:
        fsdp = devices // copy
        sizes = (2**power for power in range(1, fsdp.bit_length()))
        yield from (Layout("fsdp", copy, fsdp, ep_size=ep) for ep in sizes if not _ep_obstacle(config, ep, fsdp))
    for tp in (2**power for power in range(1, in_node.bit_length())):
        if in_node % tp == 0 and not _tp_obstacle(config, tp) and not (is_mixed and tp == devices):
            yield Layout("fsdp", 1, devices // tp, tp_size=tp)


def _chosen_layout(config: CoeConfig, settings: PlanSettings) -> Layout:
    replicate, ep, tp = settings.replicate_size or 1, settings.ep_size or 1, settings.tp_size or 1
    fsdp = settings.fsdp_size or max(1, settings.devices // (replicate * tp))
    if replicate * fsdp * tp != settings.devices:
        raise InputError(
            f"--devices is {settings.devices}, but --replicate-size {replicate} x --fsdp-size {fsdp} x --tp-size {tp} "
            f"are {replicate * fsdp * tp}. Choose sizes whose product is the number of devices."
        )
    if ep > 1 and tp > 1:
        raise InputError(f"--ep-size is {ep} and --tp-size {tp}, which are not planned together. Leave one out.")
    if ep > 1 and (obstacle := _ep_obstacle(config, ep, fsdp)):
        raise InputError(f"--ep-size is {ep}, but {obstacle}. Choose a divisor of both, or leave it out.")
    if tp > 1 and (obstacle := _tp_obstacle(config, tp)):
        raise InputError(f"--tp-size is {tp}, but {obstacle}. Choose a divisor, or leave it out.")
    if settings.dtype == "bfloat16" and replicate * fsdp == 1:
        raise InputError(
            "--dtype is bfloat16, which is FSDP's here, but --fsdp-size is 1. Choose float32, or let two devices or "
            "more share a copy."
        )
    return Layout("fsdp", replicate, fsdp, ep, tp)


def _ep_obstacle(config: CoeConfig, ep: int, fsdp: int) -> str | None:
    if not config.num_sparse_layers:
        return "the model has no experts"
    if config.n_routed_experts % ep or fsdp % ep:
        return f"the model has `n_routed_experts={config.n_routed_experts}` and {fsdp} devices share a copy"
    return None


def _tp_obstacle(config: CoeConfig, tp: int) -> str | None:
    widths = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads")}
    if config.num_sparse_layers:
        widths["moe_intermediate_size"] = config.moe_intermediate_size
    if config.num_sparse_layers < config.num_hidden_layers:
        widths["intermediate_size"] = config.intermediate_size
    uneven = next((name for name, width in widths.items() if width % tp), None)
    return None if uneven is None else f"the model has `{uneven}={widths[uneven]}`"


# ---- Memory ---------------------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """A parameter of the model. `tp_dim` is the dimension that tensor parallel cuts."""

    name: str
    shape: tuple[int, ...]
    tp_dim: int | None

    @property
    def is_expert(self) -> bool:
        return ".mlp.experts." in self.name

    @property
    def layer(self) -> str | None:
        match = re.search(r"\blayers\.(\d+)\.", self.name)
        return None if match is None else match[1]

    @property
    def is_product(self) -> bool:
        """Whether autocast multiplies with a bfloat16 copy of it."""
        own = (".mlp.gate.", "embed_tokens", "iteration_scale")
        return self.is_expert or (len(self.shape) == 2 and not any(part in self.name for part in own))

    def num_shards(self, layout: Layout) -> int:
        """Number of devices that share it by FSDP or ZeRO-3."""
        return layout.expert_fsdp_size if self.is_expert else layout.fsdp_size

    def size(self, layout: Layout, *, gathered: bool = False) -> int:
        """Number of elements that the first device holds, or that a group of FSDP gathers on it."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = math.ceil(shape[self.tp_dim] / layout.tp_size)
        if self.is_expert:
            shape[0] //= layout.ep_size
        if not gathered and layout.engine == "zero-3":
            return math.ceil(math.prod(shape) / layout.fsdp_size)
        if not gathered:
            shape[0] = math.ceil(shape[0] / self.num_shards(layout))
        return math.prod(shape)


def model_parameters(config: CoeConfig) -> list[Parameter]:
    """The parameters of the model of a configuration, which gets no storage."""
    with torch.device("meta"):
        model = CoeForCausalLM(config)
    dims = {"colwise": -2, "packed_colwise": -2, "colwise_gather_output": -2, "embedding_rowwise": -2, "rowwise": -1}
    dims["rowwise_split_input"] = -1

    def tp_dim(name: str, parameter: torch.Tensor) -> int | None:
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        module, _, kind = pattern.rpartition(".")
        dim = dims.get(model.tp_plan.get(pattern, model.tp_plan.get(module)))
        if parameter.dim() > 1 or dim is None:
            return dim
        return 0 if kind == "bias" and dim == -2 else None

    return [Parameter(name, tuple(each.shape), tp_dim(name, each)) for name, each in model.named_parameters()]


class Precision(NamedTuple):
    """Bytes of an element of the residual stream, and of what attention, MLPs and experts multiply."""

    stream: int
    products: int


def precision(layout: Layout, dtype: str) -> Precision:
    """Under FSDP2 and ZeRO-3 weights are bfloat16 when they are used, and with them everything. Autocast leaves the
    stream in float32."""
    if dtype == "float32":
        return Precision(4, 4)
    return Precision(4, 2) if layout.engine == "ddp" else Precision(2, 2)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Args:
        weights: Those that the optimizer updates, and DeepSpeed's bfloat16 ones.
        gradients: Under DDP with the buckets that they are reduced in.
        optimizer: Two states of AdamW for each weight, in float32.
        gathered: Whole weights and gradients of the layers at work, or autocast's copies of weights.
        activations: What the backward of one micro-batch needs, and the loss at its largest moment.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """All of it at once, as in the last micro-batch of several. With one micro-batch a step, gradients come as
        activations go, and the peak is lower."""
        return sum(getattr(self, each.name) for each in fields(self))


def memory(config: CoeConfig, layout: Layout, settings: PlanSettings, parameters: Sequence[Parameter]) -> Memory:
    """What a device of a layout holds."""
    held = sum(parameter.size(layout) for parameter in parameters)
    is_mixed = settings.dtype == "bfloat16"
    weights, gradients = 4, 4
    if layout.engine == "ddp":
        gradients = 4 if layout.num_batches == 1 else 8
    elif layout.engine == "zero-3":
        weights, gradients = 6, 2
    return Memory(
        weights=weights * held,
        gradients=gradients * held,
        optimizer=8 * held,
        gathered=_gathered_bytes(layout, parameters, is_mixed),
        activations=activation_bytes(
            config,
            batch_size=settings.micro_batch_size,
            length=settings.sequence_length,
            precision=precision(layout, settings.dtype),
            checkpointing=settings.gradient_checkpointing,
            tp_size=layout.tp_size,
        ),
    )


def _gathered_bytes(layout: Layout, parameters: Sequence[Parameter], is_mixed: bool) -> int:
    """Of FSDP: a layer and the next one, which is gathered meanwhile, the layer's gradients, before they are reduced
    and as they are reduced, in float32, and what is left of them for this device. The head stays gathered."""
    if layout.engine == "ddp":
        return 2 * sum(math.prod(each.shape) for each in parameters if each.is_product) if is_mixed else 0
    if layout.num_batches == 1:
        return 0
    itemsize, reduced = 2 if is_mixed else 4, 2 if layout.engine == "zero-3" else 4
    layers: dict[str, int] = {}
    head = 0
    for each in parameters:
        size = each.size(layout, gathered=True)
        if each.layer is None:
            head += size
        elif each.num_shards(layout) == 1:  # a copy to multiply with, where there is one, and no gathering ahead
            needed = size * ((itemsize if is_mixed else 0) + itemsize + reduced)
            layers[each.layer] = layers.get(each.layer, 0) + needed
        else:
            needed = size * (3 * itemsize + reduced) + each.size(layout) * reduced
            layers[each.layer] = layers.get(each.layer, 0) + needed
    if layout.engine == "zero-3":  # which has no modules that stay
        head = 0
    return itemsize * head + max(*layers.values(), (itemsize + reduced) * head)


def activation_bytes(
    config: CoeConfig,
    *,
    batch_size: int,
    length: int,
    precision: Precision,
    checkpointing: bool = False,
    tp_size: int = 1,
) -> int:
    """Bytes that a micro-batch needs at the largest moment of its step, on a GPU.

    Without checkpointing that is the backward of the loss, when all layers have what they keep. With it, it is the
    backward of the loss or that of one layer, whichever is larger.

    Args:
        config (`CoeConfig`): Of the model.
        batch_size (`int`): Sequences of the micro-batch.
        length (`int`): Tokens of a sequence.
        precision (`Precision`): Bytes of an element.
        checkpointing (`bool`): Whether layers keep their inputs alone.
        tp_size (`int`): Devices that share every matrix.
    """
    tokens, hidden = batch_size * length, config.hidden_size
    layers = [
        _layer_bytes(config, layer_idx, tokens, precision, tp_size) for layer_idx in range(config.num_hidden_layers)
    ]
    # Final norm, the input of the head, token ids and labels.
    outside = tokens * ((4 + precision.stream) * hidden + precision.products * hidden + 16)
    # In float32: the logarithms of the probabilities, their gradient, and that of the logits.
    loss = 3 * 4 * tokens * config.vocab_size
    if not checkpointing:
        return sum(layers) + outside + loss
    # Inputs of layers, and the scores of routers, which the balancing losses need.
    outside += len(layers) * tokens * precision.stream * hidden
    outside += sum(
        config.num_iterations(layer_idx) * tokens * 4 * config.n_routed_experts for layer_idx in config.sparse_layers
    )
    # Gradients of the rows of one iteration: as the sum over K spreads them and times their weights, both in float32,
    # and cast to what experts compute in.
    rows = max((config.experts_per_iteration(layer_idx) for layer_idx in config.sparse_layers), default=0) * tokens
    row = (2 * 4 + (0 if precision.products == 4 else precision.products)) * hidden
    return outside + max(loss, max(layers) + rows * row)


def _layer_bytes(config: CoeConfig, layer_idx: int, tokens: int, precision: Precision, tp_size: int) -> int:
    """Bytes that autograd keeps of one layer."""
    hidden, stream = config.hidden_size, precision.stream
    norm = (4 + stream) * hidden + 4  # its input in float32, and what its weight multiplies
    bytes_per_token = 2 * norm + _attention_bytes(config, precision, tp_size)
    if not config.is_sparse_layer(layer_idx):
        return tokens * (bytes_per_token + _mlp_bytes(config.intermediate_size // tp_size, hidden, precision))
    iterations = config.num_iterations(layer_idx)
    bytes_per_token += norm * (config.iteration_norm * (iterations - 1) + config.branch_norm * iterations)
    for iteration in range(iterations):
        bytes_per_token += _iteration_bytes(config, layer_idx, iteration, precision, tp_size)
    router_weights = 0 if stream == 4 else 4 * config.n_routed_experts * hidden * iterations  # copies in float32
    return tokens * bytes_per_token + router_weights


def _input_bytes(num_products: int, precision: Precision) -> int:
    """Of an element of the stream that several products read: itself, or a copy for each by autocast."""
    return precision.stream if precision.stream == precision.products else num_products * precision.products


def _attention_bytes(config: CoeConfig, precision: Precision, tp_size: int) -> int:
    """Of one token: inputs of the projections, norms inside, queries, keys, values, output and log-sum-exp."""
    backbone, hidden, itemsize = BACKBONES[config.backbone], config.hidden_size, precision.products
    is_split = config.base_model_tp_plan.get("layers.*.self_attn.o_proj") == "rowwise"
    heads = config.num_attention_heads // (tp_size if is_split else 1)
    norm = 4 + itemsize  # of an element
    if backbone.has_latent_attention:
        kept = _input_bytes(2, precision) * hidden
        if config.q_lora_rank is not None:
            kept += (norm + itemsize) * config.q_lora_rank
        kept += (norm + itemsize) * config.kv_lora_rank
        # Values are a view of what the latents expand to, which has the keys' part without position too.
        widths = 2 * config.qk_head_dim + config.qk_nope_head_dim + 2 * config.v_head_dim
        return kept + itemsize * heads * widths + 4 * heads
    query = heads * config.head_dim
    key = config.num_key_value_heads * query // config.num_attention_heads
    kept = _input_bytes(3, precision) * hidden + itemsize * (2 * query + 2 * key) + 4 * heads
    return kept + (norm * (query + key) if config.query_key_norms is not None else 0)


def _mlp_bytes(width: int, hidden: int, precision: Precision) -> int:
    """Of one token: the input, gate, activation, up and their product."""
    return _input_bytes(2, precision) * hidden + 4 * precision.products * width


def _iteration_bytes(config: CoeConfig, layer_idx: int, iteration: int, precision: Precision, tp_size: int) -> int:
    """Of one token in one iteration: its input in float32 for the router, the scores twice (weights and balancing
    loss), a row for each chosen expert, shared experts, and what a learned scale multiplies."""
    hidden, stream, top_k = config.hidden_size, precision.stream, config.experts_per_iteration(layer_idx)
    kept = 4 * hidden + 2 * 4 * config.n_routed_experts + 16 * top_k
    # Sorted inputs, gate and up, activation, their product, outputs; three indices and a weight.
    row = precision.products * (2 * hidden + 4 * config.moe_intermediate_size // tp_size) + 28
    kept += top_k * row
    if config.shared_expert_width and not (config.upcycling == "split" and iteration > 0):
        kept += _mlp_bytes(config.shared_expert_width // tp_size, hidden, precision)
        if precision == Precision(4, 4):  # the router's input, counted already
            kept -= 4 * hidden
        if BACKBONES[config.backbone].gates_shared_experts:
            kept += precision.products * hidden
    if config.upcycling is not None and iteration < config.num_iterations(layer_idx) - 1:
        kept += stream * hidden
    return kept


# ---- Time -----------------------------------------------------------------------------------------------------------


class Flops(NamedTuple):
    """Floating-point operations (2 per multiply-add) of one token in the forward pass. The backward has twice as many.

    Args:
        products: Of attention, dense MLPs and the head with their weights.
        attention: Of queries with keys, and of weights with values; half of all pairs, since the mask is causal.
        experts: `CoeConfig.expert_flops_per_token`, routed and shared.
        routers: In float32.
    """

    products: int
    attention: int
    experts: int
    routers: int

    @property
    def total(self) -> int:
        return sum(self)


def forward_flops(config: CoeConfig, length: int, parameters: Sequence[Parameter]) -> Flops:
    """Floating-point operations of one token of sequences of `length` tokens."""
    dense = {layer_idx for layer_idx in range(config.num_hidden_layers) if not config.is_sparse_layer(layer_idx)}
    weights = sum(
        math.prod(each.shape)
        for each in parameters
        if len(each.shape) == 2
        and (".self_attn." in each.name or (".mlp." in each.name and int(each.layer or 0) in dense))
    )
    latent = BACKBONES[config.backbone].has_latent_attention
    width = config.qk_head_dim + config.v_head_dim if latent else 2 * config.head_dim
    router_calls = sum(config.num_iterations(layer_idx) for layer_idx in config.sparse_layers)
    return Flops(
        products=2 * (weights + config.vocab_size * config.hidden_size),
        attention=config.num_hidden_layers * config.num_attention_heads * width * length,
        experts=config.expert_flops_per_token,
        routers=2 * router_calls * (config.n_routed_experts or 0) * config.hidden_size,
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends, and receives, in one step.

    Args:
        sharded: Weights gathered for forward and backward, and gradients scattered, in every micro-batch.
        replicated: Gradients that are averaged over copies, once a step.
        exchanged: Tokens sent to their experts and back, C times a layer, and the same for their gradients.
        summed: Outputs and gradients that tensor parallel adds up.
    """

    sharded: float
    replicated: float
    exchanged: float
    summed: float


def traffic(config: CoeConfig, layout: Layout, settings: PlanSettings, parameters: Sequence[Parameter]) -> Traffic:
    """What a device of a layout sends in one step. Collectives move what a ring does: `(n - 1) / n` of a gathered
    tensor, twice that to average one."""
    micro_batches = settings.batch_size // (settings.micro_batch_size * layout.num_batches)
    tokens = settings.micro_batch_size * settings.sequence_length
    itemsize = 2 if settings.dtype == "bfloat16" else 4
    passes = 3 if settings.gradient_checkpointing else 2  # forward, backward, and forward again

    def rest(size: int) -> float:
        return (size - 1) / size

    sharded = 0.0
    for each in parameters if layout.engine != "ddp" else ():
        scattered = 2 if layout.engine == "zero-3" else 4
        sharded += (2 * itemsize + scattered) * each.size(layout, gathered=True) * rest(each.num_shards(layout))
    held = sum(each.size(layout) for each in parameters)
    rows = tokens * sum(
        config.num_iterations(layer_idx) * config.experts_per_iteration(layer_idx)
        for layer_idx in config.sparse_layers
    )
    # Attention, dense MLPs, and in every iteration routed and shared experts, each in its own sum.
    sums = config.num_hidden_layers + (config.num_hidden_layers - config.num_sparse_layers)
    sums += sum(
        config.num_iterations(layer_idx) * (2 if config.shared_expert_width else 1)
        for layer_idx in config.sparse_layers
    )
    return Traffic(
        sharded=micro_batches * sharded,
        replicated=2 * 4 * held * rest(layout.replicate_size),
        exchanged=micro_batches * passes * 2 * rows * config.hidden_size * itemsize * rest(layout.ep_size),
        summed=micro_batches * passes * sums * 2 * tokens * config.hidden_size * itemsize * rest(layout.tp_size),
    )


def step_seconds(
    config: CoeConfig, layout: Layout, settings: PlanSettings, flops: Flops, moved: Traffic
) -> tuple[float, float, float]:
    """Seconds that one step computes, that it moves weights and gradients (meanwhile), and that it exchanges or sums
    activations (which the next product waits for)."""
    tokens = settings.batch_size * settings.sequence_length / settings.devices
    passes = 4 if settings.gradient_checkpointing else 3
    is_mixed = settings.dtype == "bfloat16"
    fast_peak = settings.peak if is_mixed else settings.peak_float32
    fast = flops.total - flops.routers
    computing = tokens * passes * (fast / fast_peak + flops.routers / settings.peak_float32)
    computing /= settings.efficiency * 10**12

    in_node = min(settings.devices, settings.devices_per_node)

    def bandwidth(size: int, stride: int) -> float:
        """Bytes a second of a ring over `size` devices, every `stride`th. All rings of a machine share its links to
        others: as many devices of the ring as are in the machine carry its bytes out."""
        own = max(1, in_node // stride)
        most = settings.node_bandwidth
        return GB * settings.link_efficiency * (most if size <= own else min(most, own * settings.network_bandwidth))

    moving = moved.sharded / bandwidth(layout.fsdp_size, layout.tp_size)
    moving += moved.replicated / bandwidth(layout.replicate_size, layout.fsdp_size * layout.tp_size)
    waiting = moved.summed / bandwidth(layout.tp_size, 1)
    if layout.ep_size > 1:  # every device has bytes for every other, so each link carries its own
        outside = max(0, layout.ep_size - in_node) / (layout.ep_size - 1)
        slowest = max(outside / settings.network_bandwidth, (1 - outside) / settings.node_bandwidth)
        waiting += moved.exchanged * slowest / (GB * settings.link_efficiency)
    return computing, moving, waiting


# ---- Plan -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What is expected of a layout.

    Args:
        layout: It.
        memory: Bytes of one device.
        fits: Whether they fit its memory.
        traffic: Bytes that one device sends in one step.
        seconds: Of one step.
        tokens_per_second: Of one device.
        flop_utilization: Model FLOPs, without what checkpointing computes again, as a part of the bfloat16 peak (the
            float32 one where everything is float32).
    """

    layout: Layout
    memory: Memory
    fits: bool
    traffic: Traffic
    seconds: float
    tokens_per_second: float
    flop_utilization: float


@dataclass(frozen=True)
class Plan:
    """Counts of a model, and every layout that divides.

    Args:
        parameters: Number of them, tied embeddings once.
        active_parameters: Number that one token can use.
        flops: Of one token, forward.
        estimates: One for each layout, the simplest first.
        best: The simplest of those that fit and are within 5 % of the fastest, or `None` where none fits.
    """

    parameters: int
    active_parameters: int
    flops: Flops
    estimates: tuple[Estimate, ...]
    best: Estimate | None


def plan(config: CoeConfig, settings: PlanSettings) -> Plan:
    """Estimates every layout of a training run.

    Raises:
        InputError: The settings have no meaning, do not divide, or exceed the model.
    """
    check_settings(settings)
    if settings.sequence_length > config.max_position_embeddings:
        raise InputError(
            f"--sequence-length is {settings.sequence_length}, but the model has `max_position_embeddings="
            f"{config.max_position_embeddings}`. Choose that or less."
        )
    parameters = model_parameters(config)
    flops = forward_flops(config, settings.sequence_length, parameters)
    estimates = tuple(_estimate(config, layout, settings, parameters, flops) for layout in layouts(config, settings))
    fitting = [each for each in estimates if each.fits]
    fastest = max((each.tokens_per_second for each in fitting), default=0)
    best = next((each for each in fitting if each.tokens_per_second >= CLOSE * fastest), None)
    return Plan(config.total_parameters, config.active_parameters, flops, estimates, best)


def _estimate(
    config: CoeConfig, layout: Layout, settings: PlanSettings, parameters: Sequence[Parameter], flops: Flops
) -> Estimate:
    at_once = settings.micro_batch_size * layout.num_batches
    if settings.batch_size % at_once:
        raise InputError(
            f"--batch-size is {settings.batch_size}, no multiple of the {at_once} sequences that {layout} computes at "
            f"once (--micro-batch-size {settings.micro_batch_size}). Choose a multiple."
        )
    needed = memory(config, layout, settings, parameters)
    moved = traffic(config, layout, settings, parameters)
    computing, moving, waiting = step_seconds(config, layout, settings, flops, moved)
    seconds = max(computing, moving) + waiting
    tokens = settings.batch_size * settings.sequence_length / settings.devices
    peak = settings.peak if settings.dtype == "bfloat16" else settings.peak_float32
    return Estimate(
        layout=layout,
        memory=needed,
        fits=needed.total <= USABLE * parse_bytes(settings.memory),
        traffic=moved,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        flop_utilization=tokens * 3 * flops.total / (seconds * peak * 10**12),
    )


def launch_line(source: str, layout: Layout, settings: PlanSettings) -> str:
    """The command that starts a layout. Where there are several machines, each of them runs it."""
    nodes = max(1, settings.devices // settings.devices_per_node)
    per_node = min(settings.devices, settings.devices_per_node)
    data = f"--output-dir OUT --batch-size {settings.batch_size} --block-size {settings.sequence_length}"
    if layout.engine != "fsdp":
        file = {"ddp": "ddp", "zero-3": "deepspeed_zero3"}[layout.engine]
        machines = "" if nodes == 1 else f" --num_machines {nodes} --machine_rank RANK --main_process_ip HEAD"
        start = f"accelerate launch --config_file examples/accelerate/{file}.yaml --num_processes {settings.devices}"
        return f"{start}{machines} examples/pretrain.py --model {source} {data}"
    place = "--standalone" if nodes == 1 else f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HEAD:29500"
    sizes = " ".join(
        f"{option(each.name)} {getattr(layout, each.name)}"
        for each in fields(LayoutSettings)
        if getattr(layout, each.name) > 1 or each.name == "fsdp_size"
    )
    checkpointing = " --activation-checkpointing" if settings.gradient_checkpointing else ""
    return (
        f"torchrun {place} --nproc-per-node {per_node} examples/pretrain_distributed.py --config {source} {data} "
        f"--micro-batch-size {settings.micro_batch_size} --dtype {settings.dtype}{checkpointing} {sizes}"
    )


_COLUMNS = ("weights", "gradients", "optimizer", "gathered", "activations", "total", "tokens/s", "MFU", "exchanged")


def describe(source: str, plan: Plan, settings: PlanSettings) -> str:
    """The plan as the command prints it: bytes of a device in units of 10^9, tokens per second of a device."""
    flops, length = plan.flops, settings.sequence_length
    shares = f"{flops.experts / flops.total:.0%} experts, {flops.attention / flops.total:.0%} attention"
    step = f"{settings.batch_size} sequences of {length} tokens, {settings.micro_batch_size} at once on a device"
    lines = [
        f"parameters         {plan.parameters:,}",
        f"active parameters  {plan.active_parameters:,}",
        f"FLOPs per token    {flops.total:.3e} forward ({shares}), {3 * flops.total:.3e} training",
        f"devices            {settings.devices} with {settings.memory}, of which {USABLE:.0%} are used",
        f"step               {step}, {settings.dtype}{', checkpointed' * settings.gradient_checkpointing}",
        "",
        f"{'GB of a device':<33}" + "".join(f"{name:>{len(name) + 2}}" for name in _COLUMNS),
    ]
    for each in plan.estimates:
        held = each.memory
        cells = [f"{getattr(held, part.name) / GB:.2f}" for part in fields(held)] + [f"{held.total / GB:.2f}"]
        cells += [f"{each.tokens_per_second:,.0f}", f"{each.flop_utilization:.0%}"]
        cells += [f"{each.traffic.exchanged / GB:.1f}"] if each.traffic.exchanged else []
        mark = "best" if each is plan.best else "fits" if each.fits else "no"
        cells = [f"{cell:>{len(name) + 2}}" for name, cell in zip(_COLUMNS, cells, strict=False)]
        lines.append(f"{mark:>4} {each.layout!s:<28}" + "".join(cells))
    links = f"{settings.node_bandwidth:g} GB/s in a machine and {settings.network_bandwidth:g} GB/s between machines"
    lines += [
        "",
        f"Nothing is measured. Products reach {settings.efficiency:.0%} of {settings.peak:g} TFLOP/s, or of "
        f"{settings.peak_float32:g} in float32 (routers).",
        f"Links reach {settings.link_efficiency:.0%} of {links}. Weights and gradients move while products run;",
        "tokens that experts exchange (GB that a device sends in a step), and sums of tensor parallelism, do not.",
        "",
    ]
    if plan.best is None:
        lines.append("Nothing fits. Try --gradient-checkpointing, a smaller --micro-batch-size, or more devices.")
    else:
        lines.append(launch_line(source, plan.best.layout, settings))
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """`coe-plan`."""
    settings = parse_settings(argv)
    config = load_config(settings.config)
    print(describe(settings.config, plan(config, settings), settings))


if __name__ == "__main__":
    main()
