# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""What routers did, as sums over tokens in memory that does not grow, and what follows from them.

T tokens, N experts, C iterations, K experts per token and iteration; layers and iterations count from 0.
"""

import math
from itertools import islice, pairwise
from typing import Any

import torch
import torch.distributed as dist

from ..balancing import router_scores
from ..configuration_coe import CoeConfig


# Numbers that `LayerRouting` has for every iteration: of the load, and of the scores.
LOAD_STATISTICS = ("max_vio", "load_entropy", "dead_share")
ITERATION_STATISTICS = (*LOAD_STATISTICS, "margin", "router_entropy")
# A table of more rows than this shows means over layers and the worst rows.
MOST_ROWS, WORST_ROWS = 12, 5


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
    to its [`LayerRouting`], which defines the statistics; `print` shows them as a table, of many routers as means over
    layers with the worst routers. Load and re-use are not shown where every iteration takes all experts (`has_load` is
    false): they are what they must be.

    Args:
        config (`CoeConfig`): Tells the sparse layers, the iterations of each, the experts and the scoring function.

    Raises:
        ValueError: No layer is sparse.
    """

    def __init__(self, config: CoeConfig):
        if not config.sparse_layers:
            raise ValueError("The model has no sparse layers, so there is no routing to record.")
        self.num_experts, self.scoring_func = config.n_routed_experts, config.scoring_func
        self.has_load = any(config.experts_per_iteration(i) < self.num_experts for i in config.sparse_layers)
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
        columns = (*ITERATION_STATISTICS, "reuse") if self.has_load else ("margin", "router_entropy")
        rows = []  # layer, iteration, values by column
        for layer in self.summary()["layers"]:
            previous = [{}, *layer["transitions"]]  # what an iteration re-uses is in the transition to it
            for row, transition in zip(layer["iterations"], previous, strict=True):
                rows.append((layer["layer"], row["iteration"], [(row | transition).get(name) for name in columns]))
        lines = [
            f"{self.tokens:,} tokens, {self.num_experts} experts",
            f"{'layer':>5}{'iteration':>11}" + "".join(f"{name:>16}" for name in columns),
        ]
        if len(rows) > MOST_ROWS:
            for t in range(max(iteration for _, iteration, _ in rows) + 1):
                values = zip(*(row for _, iteration, row in rows if iteration == t), strict=True)
                lines.append(_table_row("mean", t, [_mean(column) for column in values]))
            # The highest `max_vio`, or the lowest margin.
            worst = sorted(rows, key=lambda row: row[2][0] or 0.0, reverse=self.has_load)[:WORST_ROWS]
            kind = "highest" if self.has_load else "lowest"
            lines.append(f"of {len(rows)} routers those with the {kind} {columns[0]}")
            rows = worst
        return "\n".join([*lines, *(_table_row(*row) for row in rows)])


def _table_row(layer: int | str, iteration: int, values: list[float | None]) -> str:
    shown = (f"{'-' if value is None else format(value, '.4f'):>16}" for value in values)
    return f"{layer:>5}{iteration:>11}" + "".join(shown)


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rows(layer: LayerRouting, *names: str) -> list[dict[str, Any]]:
    """The values of statistics, one dictionary per iteration or transition."""
    columns = [_plain(getattr(layer, name).tolist()) for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    """Nested lists of numbers with None in place of what JSON cannot hold."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if math.isfinite(value) else None
