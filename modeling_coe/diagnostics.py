# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What the routers of a Chain-of-Experts model do: statistics of any forward, or of a data set.

    with record_routing(model) as routing:
        model(**batch)
    print(routing)

[`callbacks`](callbacks.py) logs them in training, and [`plots`](plots.py) draws them. From the shell,
`coe-routing MODEL DATA --out DIR` ([`routing_cli`](routing_cli.py)) measures and draws.

T tokens, N experts, C iterations, K experts per token and iteration; layers and iterations count from 0.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .balancing import router_scores
from .configuration_coe import CoeConfig
from .modeling_coe import _token_mask


logger = logging.get_logger(__name__)

Batch = dict[str, torch.Tensor]

# Numbers that `LayerRouting` has for every iteration.
ITERATION_STATISTICS = ("max_vio", "load_entropy", "dead_share", "margin", "router_entropy")
NOTHING_RECORDED = (
    "No forward was recorded. A model that was compiled and called before does not call the hooks that record: start "
    "recording first."
)


class LayerRouting:
    """Sums over the tokens that one sparse layer has routed, and what follows from them.

    With `n[t, e]` the number of tokens for which iteration t chose expert e, `m[t, i, j]` the number of those that
    chose i in iteration t and j in iteration t+1, and `s` the scores of a token:

    | property | shape | value | if routing is uniform |
    | --- | --- | --- | --- |
    | `load` | (C, N) | `n[t, e] / sum_e n[t, e]` | 1 / N |
    | `max_vio` | (C,) | `N * max_e load[t, e] - 1`, MaxVio of arXiv 2408.15664, section 4.1 | 0 |
    | `load_entropy` | (C,) | `-sum_e load ln(load) / ln(N)` | 1 |
    | `dead_share` | (C,) | share of experts with `n[t, e] = 0` | 0 |
    | `margin` | (C,) | mean of the best minus the second best score, selection bias left out | 0 |
    | `router_entropy` | (C,) | mean of `-sum_e p ln(p) / ln(N)` with `p = s / sum_e s` | 1 |
    | `reuse` | (C-1,) | `sum_i m[t, i, i] / sum_e n[t+1, e]`, share of t+1's choices that t had made | K / N |
    | `transitions` | (C-1, N, N) | `m[t, i, j] / n[t, i]`: probability of j in t+1 given i in t (figure 8) | K / N |

    All are float64 on the CPU, and NaN where they divide by 0: without tokens, and in rows of `transitions` of experts
    that were never chosen. Rows of `transitions` sum to K. The entropies are 0 where there is only one expert.

    Args:
        num_iterations (`int`): C of this layer.
        num_experts (`int`): N.

    Attributes:
        tokens (`torch.Tensor`): Number of tokens, a scalar, int64.
        selections (`torch.Tensor`): n, (C, N), int64.
        transition_counts (`torch.Tensor`): m, (C-1, N, N), int64.
        margin_sum, entropy_sum (`torch.Tensor`): Sums over tokens, (C,), float64 (float32 on MPS).
    """

    def __init__(self, num_iterations: int, num_experts: int):
        self.num_iterations, self.num_experts = num_iterations, num_experts
        self.tokens = torch.zeros((), dtype=torch.int64)
        self.selections = torch.zeros(num_iterations, num_experts, dtype=torch.int64)
        self.transition_counts = torch.zeros(num_iterations - 1, num_experts, num_experts, dtype=torch.int64)
        self.margin_sum = torch.zeros(num_iterations, dtype=torch.float64)
        self.entropy_sum = torch.zeros(num_iterations, dtype=torch.float64)

    @property
    def sums(self) -> list[torch.Tensor]:
        """All that is accumulated; the properties are functions of it."""
        return [self.tokens, self.selections, self.transition_counts, self.margin_sum, self.entropy_sum]

    def to(self, device: torch.device) -> None:
        for name in ("tokens", "selections", "transition_counts"):
            setattr(self, name, getattr(self, name).to(device))
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.margin_sum, self.entropy_sum = self.margin_sum.to(device, dtype), self.entropy_sum.to(device, dtype)

    @torch.no_grad()
    def update(
        self,
        indices: tuple[torch.Tensor, ...],
        logits: tuple[torch.Tensor, ...],
        scoring_func: str,
        token_mask: torch.Tensor | None = None,
    ) -> None:
        """Adds the tokens of one forward: C tensors of choices (T, K), int64, and C of logits (T, N). Tokens that
        `token_mask` (T elements) marks by 0 are left out."""
        device, num_tokens = self.tokens.device, len(indices[0])
        counted = torch.ones(num_tokens, dtype=torch.bool, device=device)
        if token_mask is not None:
            counted = token_mask.reshape(-1).to(device).ne(0)
        self.tokens += counted.sum()
        indices = [chosen.to(device) for chosen in indices]
        for t, (chosen, raw) in enumerate(zip(indices, logits, strict=True)):
            count_choices(self.selections[t], chosen, counted)
            scores = router_scores(raw.to(device), scoring_func)
            best = scores.topk(min(2, self.num_experts), dim=-1).values
            entropy = torch.special.entr(scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)).sum(dim=-1)
            for total, values in ((self.margin_sum, best[:, 0] - best[:, -1]), (self.entropy_sum, entropy)):
                total[t] += torch.where(counted, values, 0).sum(dtype=total.dtype)
        for t, (chosen, chosen_next) in enumerate(pairwise(indices)):
            pairs = chosen[:, :, None] * self.num_experts + chosen_next[:, None, :]
            count_choices(self.transition_counts[t], pairs, counted)

    @property
    def load(self) -> torch.Tensor:
        selections = self.selections.cpu().double()
        return selections / selections.sum(dim=-1, keepdim=True)

    @property
    def max_vio(self) -> torch.Tensor:
        return self.num_experts * self.load.amax(dim=-1) - 1

    @property
    def load_entropy(self) -> torch.Tensor:
        return torch.special.entr(self.load).sum(dim=-1) / self._uniform_entropy

    @property
    def dead_share(self) -> torch.Tensor:
        return self.load.eq(0).double().mean(dim=-1).where(self.tokens.cpu() > 0, torch.nan)

    @property
    def margin(self) -> torch.Tensor:
        return self.margin_sum.cpu().double() / self.tokens.cpu()

    @property
    def router_entropy(self) -> torch.Tensor:
        return self.entropy_sum.cpu().double() / self.tokens.cpu() / self._uniform_entropy

    @property
    def reuse(self) -> torch.Tensor:
        same = self.transition_counts.diagonal(dim1=1, dim2=2).sum(dim=-1)
        return same.cpu().double() / self.selections[1:].sum(dim=-1).cpu()

    @property
    def transitions(self) -> torch.Tensor:
        return self.transition_counts.cpu().double() / self.selections[:-1, :, None].cpu()

    @property
    def _uniform_entropy(self) -> float:
        return math.log(self.num_experts) or 1.0


def count_choices(counts: torch.Tensor, choices: torch.Tensor, counted: torch.Tensor) -> None:
    """Adds 1 to `counts.flatten()[choice]` for every choice (T, ...) of the tokens that `counted` (T,) marks. Integers
    all the way: exact under autocast, and no synchronisation with the device."""
    weights = counted.long().view(-1, *[1] * (choices.dim() - 1)).expand_as(choices)
    counts.view(-1).scatter_add_(0, choices.flatten(), weights.flatten())


def sum_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Adds up tensors of one dtype over all ranks, in place and in one message, where there are ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    device = "cpu" if "gloo" in dist.get_backend() else torch.accelerator.current_accelerator()
    flat = torch.cat([tensor.flatten().to(device) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


class RoutingStatistics:
    """Statistics of all routers of a model over a stream of forwards, in memory that does not grow.

    [`record_routing`] feeds it, or `update` with what a forward returned. `layers` maps the index of each sparse layer
    to its [`LayerRouting`], which defines the statistics; `print` shows them as a table.

    Args:
        config (`CoeConfig`): Tells the sparse layers, the iterations of each, the experts and the scoring function.

    Raises:
        ValueError: No layer is sparse.
    """

    def __init__(self, config: CoeConfig):
        if not config.sparse_layers:
            raise ValueError("The model has no sparse layers, so there is no routing to record.")
        self.num_experts, self.scoring_func = config.n_routed_experts, config.scoring_func
        self.layers = {
            layer_idx: LayerRouting(config.num_iterations(layer_idx), self.num_experts)
            for layer_idx in config.sparse_layers
        }

    @property
    def tokens(self) -> int:
        """Number of tokens recorded."""
        return int(next(iter(self.layers.values())).tokens)

    def update(
        self,
        router_indices: tuple[torch.Tensor, ...],
        router_logits: tuple[torch.Tensor, ...],
        token_mask: torch.Tensor | None = None,
    ) -> None:
        """Adds one forward.

        Args:
            router_indices (`tuple[torch.Tensor, ...]`): Experts chosen in every router call, (T, K), int64: sparse
                layers in order, the iterations of each in order, as the model returns them.
            router_logits (`tuple[torch.Tensor, ...]`): Raw logits of every router call, (T, N).
            token_mask (`torch.Tensor`, *optional*): T elements of any shape, 0 for padding.

        Raises:
            ValueError: The number of router calls or of tokens is another.
        """
        num_calls = sum(layer.num_iterations for layer in self.layers.values())
        if not len(router_indices) == len(router_logits) == num_calls:
            raise ValueError(
                f"Got {len(router_indices)} `router_indices` and {len(router_logits)} `router_logits`; this "
                f"configuration makes {num_calls} router calls. Give those of one whole forward."
            )
        if token_mask is not None and token_mask.numel() != len(router_indices[0]):
            raise ValueError(
                f"`token_mask` has {token_mask.numel()} elements, but {len(router_indices[0])} tokens were routed. "
                "Give the mask of these tokens."
            )
        indices, logits = iter(router_indices), iter(router_logits)
        for layer in self.layers.values():
            calls = [tuple(islice(stream, layer.num_iterations)) for stream in (indices, logits)]
            if layer.tokens.device != calls[0][0].device and layer.tokens.device.type == "cpu":
                layer.to(calls[0][0].device)
            layer.update(*calls, self.scoring_func, token_mask)

    def merge(self, other: "RoutingStatistics") -> "RoutingStatistics":
        """Adds what another object has recorded, and returns this one.

        Raises:
            ValueError: The other is of a model with other layers, iterations, experts or scores.
        """
        if self._layout != other._layout:
            raise ValueError(
                "Only statistics of one architecture can be merged; these have (experts, scores, iterations by layer) "
                f"{self._layout} and {other._layout}."
            )
        for mine, others in zip(self._sums, other._sums, strict=True):
            mine += others.to(mine)
        return self

    def all_reduce(self) -> "RoutingStatistics":
        """Replaces the sums by those over all ranks, where `torch.distributed` is initialised, and returns this
        object. Every rank must call it, those without tokens too. Ranks that share a batch (tensor parallel) count
        its tokens once each, which leaves all shares and means as they are."""
        for is_float in (False, True):
            sum_over_ranks([total for total in self._sums if total.is_floating_point() == is_float])
        return self

    def reset(self) -> None:
        """Forgets all tokens."""
        for total in self._sums:
            total.zero_()

    @property
    def _layout(self) -> tuple[int, str, dict[int, int]]:
        return self.num_experts, self.scoring_func, {i: layer.num_iterations for i, layer in self.layers.items()}

    @property
    def _sums(self) -> list[torch.Tensor]:
        return [total for layer in self.layers.values() for total in layer.sums]

    def summary(self) -> dict[str, Any]:
        """All statistics as lists and numbers that `json` writes, with None in place of NaN.

        Returns:
            `tokens`, `experts` and `layers`, with an entry for every sparse layer: its index `layer`; `iterations`, a
            list with the statistics of each; `transitions`, a list with those from each iteration to the next.
        """
        layers = []
        for layer_idx, layer in self.layers.items():
            iterations = _rows(layer, *ITERATION_STATISTICS, "load", "selections")
            transitions = _rows(layer, "reuse", "transitions", "transition_counts")
            layers.append(
                {
                    "layer": layer_idx,
                    "iterations": [{"iteration": t} | row for t, row in enumerate(iterations)],
                    "transitions": [{"from": t, "to": t + 1} | row for t, row in enumerate(transitions)],
                }
            )
        return {"tokens": self.tokens, "experts": self.num_experts, "layers": layers}

    def __str__(self) -> str:
        columns = (*ITERATION_STATISTICS, "reuse")
        lines = [
            f"{self.tokens:,} tokens, {self.num_experts} experts",
            f"{'layer':>5}{'iteration':>11}" + "".join(f"{name:>16}" for name in columns),
        ]
        for layer in self.summary()["layers"]:
            previous = [{}, *layer["transitions"]]  # what an iteration re-uses is in the transition to it
            for row, transition in zip(layer["iterations"], previous, strict=True):
                values = [(row | transition).get(name) for name in columns]
                shown = (f"{'-' if value is None else format(value, '.4f'):>16}" for value in values)
                lines.append(f"{layer['layer']:>5}{row['iteration']:>11}" + "".join(shown))
        return "\n".join(lines)


def _rows(layer: LayerRouting, *names: str) -> list[dict[str, Any]]:
    """The values of statistics, one dictionary per iteration or transition."""
    columns = [_plain(getattr(layer, name).tolist()) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    """Nested lists of numbers with None in place of what JSON cannot hold."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if math.isfinite(value) else None


# ---- Recording ------------------------------------------------------------------------------------------------------


@contextmanager
def record_routing(
    model: nn.Module, statistics: RoutingStatistics | None = None, *, training_only: bool = False
) -> Iterator[RoutingStatistics]:
    """Records all forwards of a model inside a `with` block, whether or not they return router logits.

    Padding is left out where the forward gets a two-dimensional attention mask. What gradient checkpointing computes
    again in the backward pass is not counted again. A bare `CoeModel` returns its router logits and indices meanwhile;
    nothing else about the forwards changes. A compiled model must not have been called before.

    Args:
        model (`nn.Module`): A Chain-of-Experts model, or a wrapper of one (DDP, PEFT, ...).
        statistics (`RoutingStatistics`, *optional*): Where to add the tokens; a new object if not given.
        training_only (`bool`, defaults to `False`): Leave out forwards in evaluation mode or without gradients.

    Yields:
        `RoutingStatistics`: The statistics, at any time those of the forwards so far.

    Raises:
        ValueError: There is no Chain-of-Experts model, or it has no sparse layers.
    """
    if statistics is None:
        statistics = RoutingStatistics(find_coe_model(model).config)
    tokens = statistics.tokens
    with watch_routers(model, statistics.update, training_only=training_only):
        yield statistics
    if statistics.tokens == tokens:
        logger.warning(NOTHING_RECORDED)


def find_coe_model(model: nn.Module) -> PreTrainedModel:
    """The `CoeModel`, of this package or of a folder's own code, inside a model with a head or a wrapper.

    Raises:
        ValueError: There is none.
    """
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) or {}
        if "router_indices" in recorded and module.base_model is module:
            return module
    raise ValueError(f"There is no Chain-of-Experts model in this {type(model).__name__}. Pass one, or its wrapper.")


def is_training_pass(model: nn.Module) -> bool:
    """Whether this forward is one to train on. Trainers that generate do so in training mode, without gradients."""
    return model.training and torch.is_grad_enabled()


def watch_routers(model: nn.Module, receive: Callable[..., None], *, training_only: bool = False) -> ExitStack:
    """Calls `receive(router_indices, router_logits, token_mask)` after every forward of the base model, from now on
    until what it returns is closed, or left as the context of a `with` block.

    The model's own recording does the work. It ends with the forward, so recomputation in the backward pass, which
    runs the layers again and not the base model, is not part of it.

    Args:
        model (`nn.Module`): A Chain-of-Experts model, or a wrapper of one.
        receive (`Callable`): Gets the choices (T, K) and raw logits (T, N) of every router call, as the model returns
            them, and a bool tensor (T,) that is `False` for padding.
        training_only (`bool`, defaults to `False`): Leave out forwards in evaluation mode or without gradients.

    Returns:
        `ExitStack`: Holds the hooks.

    Raises:
        ValueError: There is no Chain-of-Experts model.
    """

    def ask(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if training_only and not is_training_pass(base):
            return None
        return args, kwargs | {"output_router_logits": True, "output_router_indices": True}

    def pass_on(base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if training_only and not is_training_pass(base):
            return
        if isinstance(output, tuple):
            raise ValueError("Routing is not recorded where `return_dict=False`. Leave it out while recording.")
        hidden_states = output.last_hidden_state
        attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        token_mask = _token_mask(attention_mask, hidden_states.shape[1])
        if token_mask is None:
            token_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        receive(output.router_indices, output.router_logits, token_mask.flatten())

    base, hooks = find_coe_model(model), ExitStack()
    hooks.enter_context(base.register_forward_pre_hook(ask, with_kwargs=True))
    hooks.enter_context(base.register_forward_hook(pass_on, with_kwargs=True))
    return hooks


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _run(model: nn.Module, batch: Batch) -> None:
    device = find_coe_model(model).device
    model(**{name: tensor.to(device) for name, tensor in batch.items()})


def measure_routing(model: nn.Module, batches: Iterable[Batch]) -> RoutingStatistics:
    """Statistics of a model on data, in evaluation mode and without gradients.

    Args:
        model (`nn.Module`): A Chain-of-Experts model, or a wrapper of one.
        batches (`Iterable[dict[str, torch.Tensor]]`): Arguments of one forward each, such as a tokenizer returns.

    Returns:
        `RoutingStatistics`: Of all batches.
    """
    with _evaluating(model), record_routing(model) as statistics:
        for batch in batches:
            _run(model, batch)
    return statistics


def routing_stability(model_a: nn.Module, model_b: nn.Module, batches: Iterable[Batch]) -> dict[int, list[float]]:
    """How far two checkpoints choose the same experts for the same tokens, in evaluation mode.

    For every layer and iteration it is the mean over tokens of `|A & B| / K`, where A and B are the sets of K experts
    that the two models choose: 1 where all choices agree, K / N where they have nothing to do with each other.

    Args:
        model_a, model_b (`nn.Module`): Models with the same sparse layers, iterations, experts and K.
        batches (`Iterable[dict[str, torch.Tensor]]`): Arguments of one forward each.

    Returns:
        `dict[int, list[float]]`: Index of each sparse layer -> agreement in each iteration; NaN without tokens.

    Raises:
        ValueError: The models route differently.
    """
    layouts = []
    for model in (model_a, model_b):
        config = find_coe_model(model).config
        layers = {i: (config.num_iterations(i), config.experts_per_iteration(i)) for i in config.sparse_layers}
        layouts.append((config.n_routed_experts, layers))
    if layouts[0] != layouts[1]:
        raise ValueError(
            "The models route differently (experts, and iterations and experts per iteration by layer): "
            f"{layouts[0]} and {layouts[1]}. Compare checkpoints of one architecture."
        )
    top_k = torch.tensor([k for iterations, k in layouts[0][1].values() for _ in range(iterations)])
    common, tokens = torch.zeros(len(top_k), dtype=torch.int64), 0
    with _evaluating(model_a), _evaluating(model_b):
        for batch in batches:
            (choices_a, mask), (choices_b, _) = _choices(model_a, batch), _choices(model_b, batch)
            tokens += int(mask.sum())
            for call, (a, b) in enumerate(zip(choices_a, choices_b, strict=True)):
                same = a[:, :, None] == b.to(a.device)[:, None, :]
                common[call] += same.sum(dim=(1, 2)).cpu()[mask].sum()
    agreement = iter((common.double() / (tokens * top_k)).tolist())
    return {layer_idx: list(islice(agreement, iterations)) for layer_idx, (iterations, _) in layouts[0][1].items()}


def _choices(model: nn.Module, batch: Batch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The experts (T, K) of every router call of one forward, and which of the T tokens count."""
    seen = []
    with watch_routers(model, lambda *call: seen.append(call)):
        _run(model, batch)
    ((indices, _, token_mask),) = seen
    return indices, token_mask.cpu()
