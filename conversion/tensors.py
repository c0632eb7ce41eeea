# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Tensors in both directions: what a chain stores for a tensor of its source, and what of a chain goes back.

Most keep their values and, by the tables of the families, change their names. Four kinds are more: routers, of which
a chain has one an iteration; norms, of which it may have; scales, which chains alone have; experts made of dense MLPs,
which stay in the chain.
"""

import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from configuration_coe import CoeConfig

from .checkpoint import Checkpoint, StoredTensor, stored_dtype
from .family import Family
from .plan import Options, Output


# Every layer of every family has it: what a layer gets new is made, and stored, along with it.
_ANCHOR = "post_attention_layernorm.weight"
RANDOM_ROUTER = "new: random, orthogonal to the mean input"
_SCALES = ("iteration_scale", "iteration_scale.weight")  # on disk, and as a state dict has it
_LAYER_KEY = re.compile(r"(?P<prefix>model\.layers\.(?P<layer>\d+)\.)(?P<name>.+)")
_ITERATION_NORM = re.compile(r"iteration_norms\.\d+\.weight")
ROUTER = re.compile(r"mlp\.gate\.(?:(?P<iteration>\d+)\.)?(?P<part>weight|e_score_correction_bias)")
_DENSE_MLP = re.compile(r"mlp\.(?P<projection>(?:gate|up|down)_proj)\.weight")


class Place(NamedTuple):
    """Where in a model a tensor is: its layer, if it is in one, and its name there."""

    prefix: str
    layer: int | None
    name: str

    @classmethod
    def of(cls, key: str) -> "Place":
        match = _LAYER_KEY.fullmatch(key)
        return cls("", None, key) if match is None else cls(match["prefix"], int(match["layer"]), match["name"])


class WayBack(NamedTuple):
    """What becomes of a chain's tensor in its family: another name, or why it is left out and, where it must not be,
    what it has that the family cannot express."""

    name: str | None = None
    dropped: str | None = None
    problem: str | None = None


def to_chain(
    key: str,
    tensor: StoredTensor,
    family: Family,
    config: CoeConfig,
    options: Options,
    mlp_inputs: dict[int, torch.Tensor],
) -> list[Output]:
    """What a chain stores for a tensor of its source, new tensors of the layer included.

    Args:
        key (`str`): The tensor's name in the source.
        tensor (`StoredTensor`): Its shape and dtype.
        family (`Family`): The source's.
        config (`CoeConfig`): The chain's.
        options (`Options`): With all defaults filled in.
        mlp_inputs (`dict[int, torch.Tensor]`): Of layers that get random routers, see [`random_router`]. They are
            looked up when the tensors are made.
    """
    name = family.chain_key(key)
    place = Place.of(name)
    iterations = 0 if place.layer is None else config.num_iterations(place.layer)
    is_row = family.is_row(key)
    own_shape = tensor.shape[1:] if is_row else tensor.shape

    def output(name: str, rule: str = "copied", shape: tuple[int, ...] = own_shape, **make: Callable) -> Output:
        name = place.prefix + name
        if is_row:
            make = {"make": lambda row: row.squeeze(0)}
        return Output(name, shape, stored_dtype(name, tensor.dtype, options.dtype), key, rule, **make)

    if iterations == 0:
        return [output(place.name)]
    router = ROUTER.fullmatch(place.name)
    if router and not router["iteration"]:
        return _routers_to_chain(place, router["part"], iterations, options, output)
    if family.dense and (mlp := _DENSE_MLP.fullmatch(place.name)):
        return _experts_of_mlp(mlp["projection"], tensor.shape, config, options, output)
    outputs = [output(place.name)]
    if place.name == _ANCHOR:
        if config.iteration_norm:
            names = (f"iteration_norms.{t}.weight" for t in range(iterations - 1))
            outputs += [output(name, "copied to a later iteration") for name in names]
        outputs += _new_scale(iterations, config, output)
        if family.dense:
            outputs += _new_routers(place, iterations, config, options, mlp_inputs, output)
    return outputs


def to_source(key: str, family: Family, config: CoeConfig, checkpoint: Checkpoint) -> WayBack:
    """What becomes of a chain's tensor in its family.

    Args:
        key (`str`): The tensor's name in the chain.
        family (`Family`): Which to go back to.
        config (`CoeConfig`): The chain's.
        checkpoint (`Checkpoint`): Its tensors.
    """
    place = Place.of(key)
    if place.name in _SCALES:
        return _scale_to_source(key, checkpoint)
    if _ITERATION_NORM.fullmatch(place.name):
        return _norm_to_source(key, f"{place.prefix}{_ANCHOR}", checkpoint)
    router = ROUTER.fullmatch(place.name)
    if router and router["iteration"]:
        return _router_to_source(key, place, router, family, config, checkpoint)
    return WayBack(family.source_key(key))


# ---- Routers: one in a family's layer, one for every iteration in a chain's -----------------------------------------


def router_name(part: str, iteration: int) -> str:
    return f"mlp.gate.{iteration}.{part}"


def _routers_to_chain(
    place: Place, part: str, iterations: int, options: Options, output: Callable[..., Output]
) -> list[Output]:
    outputs = [output(router_name(part, 0))]
    for t in range(1, iterations):
        name = router_name(part, t)
        if options.router_noise and part == "weight":
            make = _add_noise(place.prefix + name, options)
            outputs.append(output(name, "copied, with noise", make=make))
        else:
            outputs.append(output(name, "copied to a later iteration"))
    return outputs


def _router_to_source(
    key: str, place: Place, router: re.Match, family: Family, config: CoeConfig, checkpoint: Checkpoint
) -> WayBack:
    """At zero scale every iteration sees the same input; what `refine` returns is the last one's."""
    is_refined = config.residual_rule == "refine"
    kept = config.num_iterations(place.layer) - 1 if is_refined else 0
    if int(router["iteration"]) == kept:
        return WayBack(family.source_key(f"{place.prefix}mlp.gate.{router['part']}"))
    if is_refined:
        return WayBack(dropped="without effect at zero scale")
    kept_key = place.prefix + router_name(router["part"], kept)
    differs = config.residual_rule == "split" and kept_key in checkpoint.tensors and checkpoint.differs(key, kept_key)
    return WayBack(
        dropped=f"equal to the router of iteration {kept}",
        problem=f"`{key}` is not `{kept_key}`" if differs else None,
    )


def _add_noise(name: str, options: Options) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: weight.float() + options.router_noise * _noise(weight.shape, name, options)


def _noise(shape: tuple[int, ...], name: str, options: Options) -> torch.Tensor:
    """Standard normal numbers that depend on the seed and the name alone, not on the order of files."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{options.seed} {name}".encode()))
    return torch.randn(shape, generator=generator)


# ---- Scales: zero in a new chain, and in one that can go back -------------------------------------------------------


def _new_scale(iterations: int, config: CoeConfig, output: Callable[..., Output]) -> list[Output]:
    if iterations == 1:
        return []
    scale = torch.zeros(iterations - 1, config.hidden_size)
    return [output("iteration_scale", "new: zero", tuple(scale.shape), make=lambda _: scale)]


def _scale_to_source(key: str, checkpoint: Checkpoint) -> WayBack:
    return WayBack(dropped="zero", problem=f"`{key}` is not zero" if checkpoint.read(key).any() else None)


# ---- Norms of iterations: copies of the layer's in a new chain, and in one that can go back -------------------------


def _norm_to_source(key: str, kept_key: str, checkpoint: Checkpoint) -> WayBack:
    differs = kept_key in checkpoint.tensors and checkpoint.differs(key, kept_key)
    return WayBack(
        dropped="equal to the norm of iteration 0", problem=f"`{key}` is not `{kept_key}`" if differs else None
    )


# ---- Experts and routers made of dense MLPs, which do not go back ---------------------------------------------------


def _experts_of_mlp(
    projection: str, shape: tuple[int, ...], config: CoeConfig, options: Options, output: Callable[..., Output]
) -> list[Output]:
    num_experts = config.n_routed_experts
    names = [f"mlp.experts.{expert}.{projection}.weight" for expert in range(num_experts)]
    if options.upcycle == "copy":
        return [output(name, "copied to an expert") for name in names]
    dim = 1 if projection == "down_proj" else 0
    width = shape[dim] // num_experts
    sliced = tuple(width if axis == dim else size for axis, size in enumerate(shape))
    return [
        output(name, "sliced", sliced, make=lambda whole, i=i: whole.narrow(dim, i * width, width))
        for i, name in enumerate(names)
    ]


def random_router(noise: torch.Tensor, mean_input: torch.Tensor | None) -> torch.Tensor:
    """A router (N, H) that spreads tokens over its experts: `noise` without its part along the mean of what it reads.

    What tokens share, a third of what an MLP of SmolLM2-135M reads, makes all of them prefer the same rows of a random
    router: the busiest of 8 experts gets 2.4 times its share, and 1.6 times without that part (means over layers and
    seeds, `benchmarks/dense_sources.py`). The scale of its rows does not matter; what needs no data helps little.

    Args:
        noise (`torch.Tensor`): (N, H), normal.
        mean_input (`torch.Tensor`, *optional*): (H,).
    """
    if mean_input is None or not mean_input.any():
        return noise
    direction = mean_input / mean_input.norm()
    return noise - torch.outer(noise @ direction, direction)


def _new_routers(
    place: Place,
    iterations: int,
    config: CoeConfig,
    options: Options,
    mlp_inputs: dict[int, torch.Tensor],
    output: Callable[..., Output],
) -> list[Output]:
    """The routers of a layer, the same for all of its iterations."""
    shape = (config.n_routed_experts, config.hidden_size)
    used = config.num_experts_per_tok * (config.inner_iter if config.upcycling == "split" else 1)
    if options.upcycle == "slice" and used == config.n_routed_experts:
        rule, make = "new: zero", lambda _: torch.zeros(shape)
    else:
        rule = RANDOM_ROUTER

        def make(_: torch.Tensor) -> torch.Tensor:
            noise = config.initializer_range * _noise(shape, place.prefix, options)
            return random_router(noise, mlp_inputs.get(place.layer))

    return [output(router_name("weight", t), rule, shape, make=make) for t in range(iterations)]
