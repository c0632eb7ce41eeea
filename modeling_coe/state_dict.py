# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""State dicts: names on disk, for `load_state_dict`, and the whole tensors of a model that ranks have shared out.

`from_pretrained` converts names by itself.
"""

from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor


# Fused parameter -> the projections it concatenates, under their names in the official layout.
FUSED_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@torch.no_grad()
def fuse_expert_weights(
    experts: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Lets `load_state_dict` read the official layout too, one tensor per expert and projection.

    A pre-hook of the experts module. `from_pretrained` converts the layout by itself; `Trainer` resumes a run, and
    loads the best checkpoint at its end, with `load_state_dict` on the file as it is. What torch promises holds as if
    every tensor of an expert were a parameter: those that a state dict lacks (a shard holds only some) stay as they
    are and are missing, those of another shape are errors, and `assign=True` takes the stored dtype and device.
    """
    assign = local_metadata.get("assign_to_params_buffers", False)
    for name, projections in FUSED_PROJECTIONS.items():
        parameter = getattr(experts, name).detach()
        shape = torch.Size((parameter.shape[1] // len(projections), parameter.shape[2]))
        keys = [f"{prefix}{e}.{projection}.weight" for e in range(len(parameter)) for projection in projections]
        stored = {key: state_dict[key] for key in keys if key in state_dict}
        if not stored or prefix + name in state_dict:
            continue
        missing = [key for key in keys if key not in stored]
        if strict:
            missing_keys += missing
        if missing and parameter.is_meta:
            continue  # there is nothing to complete them with: torch calls them unexpected, and the parameter missing
        wrong = [key for key, tensor in stored.items() if tensor.shape != shape]
        error_msgs += [
            f"size mismatch for {key}: the shape is {list(stored[key].shape)} in the checkpoint and {list(shape)} in "
            "the current model."
            for key in wrong
        ]
        fused = parameter
        if not wrong:
            dtypes = {tensor.dtype for tensor in stored.values()} | ({parameter.dtype} if missing else set())
            dtype = reduce(torch.promote_types, dtypes) if assign else parameter.dtype
            device = next(iter(stored.values())).device if assign or parameter.is_meta else parameter.device
            fused = torch.empty(parameter.shape, dtype=dtype, device=device)
            if missing:
                fused.copy_(parameter)
            for key, matrix in zip(keys, fused.view(len(keys), *shape), strict=True):
                if key in stored:
                    matrix.copy_(stored[key])
        for key in stored:
            del state_dict[key]
        state_dict[prefix + name] = fused


def rename_iteration_scale(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets `load_state_dict` read scales under their name on disk: a pre-hook of the layer, see above."""
    name = f"{prefix}iteration_scale"
    if name in state_dict:
        state_dict.setdefault(f"{name}.weight", state_dict.pop(name))


def check_gatherable(model: nn.Module) -> None:
    """Raises `ValueError` where the parameters are what FSDP1 or ZeRO-3 leaves of them between calls: only the wrapper
    around `model` can gather those."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "_fsdp_flattened") or hasattr(parameter, "_is_flat_param"):
            engine = "FSDP1"
        elif getattr(parameter, "ds_numel", parameter.numel()) != parameter.numel():
            engine = "DeepSpeed ZeRO-3"
        else:
            continue
        raise ValueError(
            f"{engine} has sharded the model, and `{name}` is not whole on any rank. Call `save_pretrained` on every "
            "rank with `state_dict=accelerator.get_state_dict(wrapped_model)`, or save with `Trainer.save_model`."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of the model are `DTensor`s, of which a rank holds a part: FSDP2 and tensor parallelism."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a sharded model, whole on the CPU of rank 0 and empty elsewhere. All ranks call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
