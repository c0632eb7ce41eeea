# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""How experts are stored: one tensor for each and every projection, or one for all of a layer, as in memory."""

import re
from functools import reduce

import torch

from modeling_coe.state_dict import FUSED_PROJECTIONS

from .checkpoint import Slice
from .plan import Output, Plan


_EXPERT = re.compile(r"(?P<prefix>.+\.mlp\.experts\.)(?P<expert>\d+)\.(?P<projection>\w+_proj)\.weight")
_FUSED = re.compile(r"(?P<prefix>.+\.mlp\.experts\.)(?P<name>" + "|".join(FUSED_PROJECTIONS) + ")")


def fuse_experts(plan: Plan) -> None:
    """Lets the tensors of a chain's experts be written as slices of fused ones, (N, 2I, H) and (N, H, I)."""
    fused: dict[str, list[int]] = {}
    for position, output in enumerate(plan.outputs):
        match = _EXPERT.fullmatch(output.name)
        if match is None:
            continue
        name, projections = next(item for item in FUSED_PROJECTIONS.items() if match["projection"] in item[1])
        rows, columns = output.shape
        index = int(match["expert"]) * len(projections) + projections.index(match["projection"])
        shape = (plan.after.n_routed_experts, len(projections) * rows, columns)
        piece = Slice(match["prefix"] + name, shape, index * rows * columns)
        plan.outputs[position] = output._replace(slice=piece)
        fused.setdefault(piece.whole, []).append(position)
    for positions in fused.values():
        dtype = reduce(torch.promote_types, (plan.outputs[position].dtype for position in positions))
        for position in positions:
            plan.outputs[position] = plan.outputs[position]._replace(dtype=dtype)


def split_experts(plan: Plan) -> None:
    """Makes of a chain's fused tensors one for each expert and projection."""
    plan.outputs = [part for output in plan.outputs for part in _split(output)]


def _split(output: Output) -> list[Output]:
    match = _FUSED.fullmatch(output.name)
    if match is None:
        return [output]
    projections = FUSED_PROJECTIONS[match["name"]]
    num_experts, rows, columns = output.shape
    rows //= len(projections)
    return [
        output._replace(
            name=f"{match['prefix']}{expert}.{projection}.weight",
            shape=(rows, columns),
            rule="taken out of a fused tensor",
            make=lambda fused, expert=expert, start=i * rows: output.make(fused)[expert, start : start + rows],
        )
        for expert in range(num_experts)
        for i, projection in enumerate(projections)
    ]
