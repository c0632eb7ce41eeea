"""The sparse layer written out token by token from the design's equations, in float64: the tests' own reference.

It shares no code with the model: plain loops over tokens, iterations and experts, autograd for the gradients.
"""

import torch
from torch.nn.functional import silu


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return down @ (silu(gate @ x) * (up @ x))


def route(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config) -> list[tuple[int, torch.Tensor]]:
    """The chosen experts of one token with their weights."""
    logits = weight @ x
    scores = torch.exp(logits) / torch.exp(logits).sum() if config.scoring_func == "softmax" else torch.sigmoid(logits)
    ranking = scores.detach() if bias is None else scores.detach() + bias
    allowed = list(range(len(scores)))
    if config.topk_method != "greedy":
        size = len(scores) // config.n_group
        groups = [allowed[start : start + size] for start in range(0, len(scores), size)]
        best = 1 if config.topk_method == "group_limited_greedy" else 2

        def group_score(group):
            return sum(sorted((ranking[e].item() for e in group), reverse=True)[:best])

        kept = sorted(groups, key=group_score, reverse=True)[: config.topk_group]
        allowed = [expert for group in kept for expert in group]
    chosen = sorted(allowed, key=lambda e: ranking[e].item(), reverse=True)[: config.num_experts_per_tok]
    weights = [scores[e] for e in chosen]
    normalised = config.norm_topk_prob and len(chosen) > 1
    if normalised:
        total = sum(weights) + 1e-20
        weights = [w / total for w in weights]
    if not normalised or config.scoring_func == "sigmoid":
        weights = [w * config.routed_scaling_factor for w in weights]
    return list(zip(chosen, weights, strict=True))


def chain(hidden_states: torch.Tensor, parameters: dict[str, torch.Tensor], config) -> torch.Tensor:
    """Output of one sparse layer's chain for `hidden_states` (tokens, hidden). `parameters` has the layer's names."""
    outputs = []
    for h in hidden_states:
        x_0 = rms_norm(h, parameters["post_attention_layernorm.weight"], config.rms_norm_eps)
        x, total = x_0, torch.zeros_like(h)
        for t in range(config.inner_iter):
            gate = f"mlp.gate.{t}" if config.use_igate else "mlp.gate"
            y = torch.zeros_like(x)
            for expert, w in route(
                x, parameters[f"{gate}.weight"], parameters.get(f"{gate}.e_score_correction_bias"), config
            ):
                gate_proj, up_proj = parameters["mlp.experts.gate_up_proj"][expert].chunk(2)
                y = y + w * swiglu(x, gate_proj, up_proj, parameters["mlp.experts.down_proj"][expert])
            if config.n_shared_experts:
                shared = [parameters[f"mlp.shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")]
                y = y + swiglu(x, *shared)
            total = total + y
            if config.init_residual:
                x = y + x_0
            elif config.inner_residual:
                x = y + x
            else:
                x = y
        if config.prenorm_residual:
            outputs.append(h + total)
        else:
            outputs.append(h + x if config.outer_residual else x)
    return torch.stack(outputs)
