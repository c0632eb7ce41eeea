# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Callbacks for transformers' `Trainer`: those of the routers, and one that keeps the CPU kernels of a run.

Not imported by `import modeling_coe`, since it needs the Trainer's modules.
"""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from . import cpu_kernels
from .diagnostics.balancer import BiasBalancer
from .diagnostics.callbacks import BiasBalancingCallback, RoutingCallback


class CpuKernelsCallback(TrainerCallback, ExportableState):
    """Goes on with the CPU kernels that the interrupted run had: `Trainer(..., callbacks=[CpuKernelsCallback()])`.

    Each process measures which kernels are fastest (see `cpu_kernels.py`), so a resumed run may have others, whose
    results differ in the last bits. With this callback the choices are part of `trainer_state.json` in every
    checkpoint, and `trainer.train(resume_from_checkpoint=...)` takes them from there. All ranks resume with those of
    the first.
    """

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"choices": cpu_kernels.choices()}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            cpu_kernels.use(saved["attributes"]["choices"])


__all__ = ["BiasBalancer", "BiasBalancingCallback", "CpuKernelsCallback", "RoutingCallback"]
