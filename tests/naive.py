"""The sparse layer written out token by token from the design's equations, in float64: the tests' own reference.

It shares no code with the model: plain loops over tokens, iterations and experts, autograd for the gradients.
"""

import math

import torch
from torch.nn.functional import silu


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return down @ (silu(gate @ x) * (up @ x))


def route(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config, used: tuple[int, ...] = ()
) -> list[tuple[int, torch.Tensor]]:
    """The chosen experts of one token with their weights. In a split layer `used` ones are not chosen again."""
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
    remaining = sorted(set(allowed) - set(used), key=lambda e: ranking[e].item(), reverse=True)
    chosen = remaining[: config.num_experts_per_tok]
    weights = [scores[e] for e in chosen]
    # A split layer normalises over what the token used before and as many of the best others as complete the set.
    num_experts = config.num_experts_per_tok * (config.inner_iter if config.upcycling == "split" else 1)
    normalised = config.norm_topk_prob and (num_experts > 1 or config.backbone != "deepseek_v2")
    if normalised:
        total = sum(scores[e] for e in [*used, *remaining[: num_experts - len(used)]]) + 1e-20
        weights = [w / total for w in weights]
    if not normalised or config.scoring_func == "sigmoid":
        weights = [w * config.routed_scaling_factor for w in weights]
    return list(zip(chosen, weights, strict=True))


def chain(hidden_states: torch.Tensor, parameters: dict[str, torch.Tensor], config) -> torch.Tensor:
    """Output of one sparse layer's chain for `hidden_states` (tokens, hidden). `parameters` has the layer's names."""
    outputs = []
    for h in hidden_states:
        x_0 = rms_norm(h, parameters["post_attention_layernorm.weight"], config.rms_norm_eps)
        # What iterations add to and pass on, and what the first of them passes on.
        reads_stream = config.iteration_norm and (config.prenorm_residual or config.upcycling is not None)
        z_0 = h if reads_stream else x_0
        z, total, used = z_0, torch.zeros_like(h), ()
        for t in range(config.inner_iter):
            x = x_0
            if t > 0:
                share = 0.0 if config.reinject is None else config.reinject / (t + 1)
                x = (1 - share) * z + share * z_0
                if config.iteration_norm:
                    x = rms_norm(x, parameters[f"iteration_norms.{t - 1}.weight"], config.rms_norm_eps)
            gate = f"mlp.gate.{t}" if config.use_igate else "mlp.gate"
            y = torch.zeros_like(x)
            bias = parameters.get(f"{gate}.e_score_correction_bias")
            chosen = route(x, parameters[f"{gate}.weight"], bias, config, used)
            if config.upcycling == "split":
                used += tuple(expert for expert, _ in chosen)
            for expert, w in chosen:
                gate_proj, up_proj = parameters["mlp.experts.gate_up_proj"][expert].chunk(2)
                y = y + w * swiglu(x, gate_proj, up_proj, parameters["mlp.experts.down_proj"][expert])
            if config.n_shared_experts and not (config.upcycling == "split" and t > 0):
                shared = [parameters[f"mlp.shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")]
                shared_output = swiglu(x, *shared)
                if config.backbone == "qwen2_moe":
                    shared_output = torch.sigmoid(parameters["mlp.shared_expert_gate.weight"] @ x) * shared_output
                y = y + shared_output
            if config.branch_norm:
                y = rms_norm(y, parameters[f"branch_norms.{t}.weight"], config.rms_norm_eps)
            if config.residual_scale is not None:
                y = config.residual_scale / (config.inner_iter * math.sqrt(config.num_hidden_layers)) * y
            y = config.residual_multiplier * y
            total = total + y
            if config.upcycling is not None:
                z = z + parameters["iteration_scale.weight"][t] * y if t < config.inner_iter - 1 else z
            elif config.init_residual:
                z = y + z_0
            elif config.inner_residual:
                z = y + z
            else:
                z = y
        if config.prenorm_residual or config.upcycling == "split":
            outputs.append(h + total)
        elif config.upcycling == "refine":
            outputs.append(h + y)
        else:
            outputs.append(h + z if config.outer_residual else z)
    return torch.stack(outputs)
