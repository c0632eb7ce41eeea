# Copyright 2026 The CoE Transformers authors. SPDX-License-Identifier: Apache-2.0
"""Chain-of-Experts (CoE, arXiv 2506.18945) model configuration."""

import copy
from math import comb, prod
from typing import Any, Literal, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GraniteMoeConfig,
    HunYuanMoEV1Config,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)


# The official implementation writes this `model_type`; its configurations are read as they are.
OFFICIAL_MODEL_TYPE = "coe_deepseekv2"

SCORING_FUNCTIONS = ("softmax", "sigmoid")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
UPCYCLINGS = ("refine", "split")


class Backbone(NamedTuple):
    """A family whose attention, rotary embedding and norms a chain can be built on, and whose plans it keeps.

    Args:
        config_class: Its configuration in transformers.
        has_latent_attention: Multi-head latent attention: the sizes of `LATENT_SIZES` are its own.
        has_window_by_layer: Its attention asks whether its layer has a sliding window; the others' have one in all
            layers or in none.
        bias: Field that gives queries, keys and values a bias.
        bias_covers_output: Whether the output projection has one too.
        query_key_norms: Whether queries and keys have norms: one for all heads together, or one that each head uses,
            before or after they are rotated.
        norms_field: Field without which there are none of these norms.
        rotates_neighbours: Its rotary embedding turns neighbouring dimensions, rather than those half a head apart.
        gates_shared_experts: By a sigmoid of the token.
        normalizes_single_expert: With one expert per token, `norm_topk_prob` makes its weight 1 or leaves it.
    """

    config_class: type[PreTrainedConfig]
    has_latent_attention: bool = False
    has_window_by_layer: bool = False
    bias: str | None = "attention_bias"
    bias_covers_output: bool = True
    query_key_norms: Literal["all heads", "each head", "each head, rotated"] | None = None
    norms_field: str | None = None
    rotates_neighbours: bool = False
    gates_shared_experts: bool = False
    normalizes_single_expert: bool = True


BACKBONES = {
    "deepseek_v2": Backbone(DeepseekV2Config, has_latent_attention=True, normalizes_single_expert=False),
    "deepseek_v3": Backbone(DeepseekV3Config, has_latent_attention=True),
    "qwen2_moe": Backbone(
        Qwen2MoeConfig,
        has_window_by_layer=True,
        bias="qkv_bias",
        bias_covers_output=False,
        gates_shared_experts=True,
    ),
    "qwen3_moe": Backbone(Qwen3MoeConfig, query_key_norms="each head"),
    "olmoe": Backbone(OlmoeConfig, query_key_norms="all heads"),
    "mixtral": Backbone(MixtralConfig, bias=None),
    "llama": Backbone(LlamaConfig),
    "qwen3": Backbone(Qwen3Config, has_window_by_layer=True, query_key_norms="each head"),
    "glm4_moe": Backbone(
        Glm4MoeConfig, bias_covers_output=False, query_key_norms="each head", norms_field="use_qk_norm"
    ),
    "minimax_m2": Backbone(MiniMaxM2Config, bias=None, query_key_norms="all heads"),
    "granitemoe": Backbone(GraniteMoeConfig),
    "ernie4_5_moe": Backbone(Ernie4_5_MoeConfig, bias="use_bias", rotates_neighbours=True),
    "hunyuan_v1_moe": Backbone(HunYuanMoEV1Config, query_key_norms="each head, rotated"),
}
# Sizes of latent attention. Where there is none they are None: engines read `kv_lora_rank` as the sign of it.
LATENT_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "qk_head_dim")

ResidualRule = Literal["inner", "outer", "both", "init", "prenorm", "none", "refine", "split"]
# The rules by the fields that select them, where these differ from their defaults. `CoeConfig` has the equations.
RESIDUAL_RULES: dict[ResidualRule, dict[str, bool | str]] = {
    "inner": {},
    "outer": {"inner_residual": False, "outer_residual": True},
    "both": {"outer_residual": True},
    "init": {"inner_residual": False, "init_residual": True},
    "prenorm": {"prenorm_residual": True},
    "none": {"inner_residual": False},
    "refine": {"upcycling": "refine"},
    "split": {"upcycling": "split"},
}
# The first official configurations name the rule in a field `residual`.
_OFFICIAL_RESIDUALS: dict[str, ResidualRule] = {"inner": "inner", "outer": "outer", "addinit": "init", "none": "none"}


@strict
class CoeConfig(DeepseekV2Config):
    r"""
    Configuration of a Chain-of-Experts model: a decoder (DeepSeek-V2's, or that of another `backbone`) whose sparse
    layers route each token `inner_iter` times, in sequence, through one set of experts.

    With `x_0 = post_attention_layernorm(h)` and `y_t` the output of iteration `t` (routed plus shared experts on
    `x_t`), the residual flags choose one of these rules:

    | `residual_rule` | `x_{t+1}` | layer output | flags | source |
    | --- | --- | --- | --- | --- |
    | `"inner"` (default) | `x_t + y_t` | `x_C` | `inner_residual` | eq. 5-6 |
    | `"outer"` | `y_t` | `h + x_C` | `outer_residual` | eq. 9 |
    | `"both"` | `x_t + y_t` | `h + x_C` | `inner_residual`, `outer_residual` | official code |
    | `"init"` | `x_0 + y_t` | `x_C` | `init_residual` | eq. 10 |
    | `"prenorm"` | `x_t + y_t` | `h + y_0 + ... + y_{C-1}` | `inner_residual`, `prenorm_residual` | pre-norm stream |
    | `"none"` | `y_t` | `x_C` | none | official code |
    | `"refine"` | `x_t + s_t * y_t` | `h + y_{C-1}` | `upcycling="refine"` | converted models |
    | `"split"` | `x_t + s_t * y_t` | `h + y_0 + ... + y_{C-1}` | `upcycling="split"` | converted models |

    `s_t` is a learned vector per layer and iteration (`iteration_scale`), zero in a new model. Every other
    combination raises. Under `"inner"`, `"init"` and `"none"` the un-normalised stream `h` does not reach the next
    layer: this is what the paper's code computes, with one iteration too. `"prenorm"` with `inner_iter=1` is
    exactly a DeepSeek-V2 layer.

    Four options, off by default, stabilise a chain under every rule. With `f_t` the experts of iteration `t`, routed
    plus shared, `z_t` what the rule calls `x_t`, C the layer's iterations and L the layers of the model:

        r_t = reinject / (t + 1)
        x_0 = post_attention_layernorm(h)
        x_t = norm_t((1 - r_t) * z_t + r_t * z_0)                     for t > 0
        y_t = residual_scale / (C * sqrt(L)) * RMSNorm_t(f_t(x_t))

    and the rule goes on with `z` for `x`. `norm_t` is there with `iteration_norm`, `RMSNorm_t` with `branch_norm`,
    and what is not there changes nothing. `z_0` is `x_0`; with `iteration_norm` it is `h` under the rules that keep
    the un-normalised stream, `"prenorm"`, `"refine"` and `"split"`.

    Fields that are not listed keep the meaning they have in [`DeepseekV2Config`]. All names of the official
    `config.json` are kept, so one loads unchanged, also with `model_type: coe_deepseekv2`, with the older
    `rope_scaling` and `rope_theta` keys, and with the rule in a field `residual`, as the first ones have it.

    Args:
        inner_iter (`int`, defaults to 2):
            Number of iterations C of the chain in every sparse layer.
        inner_residual (`bool`, defaults to `True`):
            Add each iteration's own input to its output.
        outer_residual (`bool`, defaults to `False`):
            Add the layer's un-normalised input once, after the last iteration.
        init_residual (`bool`, defaults to `False`):
            Add the normalised input of the chain, `x_0`, to each iteration's output. Excludes the other three flags.
        prenorm_residual (`bool`, defaults to `False`):
            Keep the pre-norm residual stream: the layer adds all iterations' outputs to its un-normalised input.
            Needs `inner_residual` and excludes the other two flags.
        upcycling (`str`, *optional*):
            The chain of a converted mixture of experts, which computes the source's function as long as its scales
            are zero. `"refine"` repeats the whole layer, and the last iteration is what counts. `"split"` spreads the
            experts of the source over the iterations: each takes the next `num_experts_per_tok` of its router's order
            that the token has not used yet, weights are normalised over all `inner_iter * num_experts_per_tok`, and
            the shared experts run in the first iteration only. Needs the default flags and at least two iterations.
        chain_layers (`list[int]`, *optional*):
            Indices of the sparse layers that are chained, all by default. The others run once, on the pre-norm stream
            and with all of a token's experts. For `"prenorm"`, `"refine"` and `"split"`.
        iteration_norm (`bool`, defaults to `False`):
            Every iteration after the first reads through a norm of its own, `norm_t` above. Under `"prenorm"` all then
            read the residual stream as the layers do. A converted chain keeps its source's function: its norms start
            as copies of the layer's.
        branch_norm (`bool`, defaults to `False`):
            What the experts of an iteration return is normed, each iteration by a norm of its own, before it is scaled
            or added. A converted chain does not keep its source's function. Applies with one iteration too.
        residual_scale (`float`, *optional*):
            Factor on the outputs of the iterations, divided by `inner_iter * sqrt(num_hidden_layers)` (by
            `sqrt(num_hidden_layers)` in layers that run once). A converted chain does not keep its source's function.
        reinject (`float`, *optional*):
            How much of the chain's input iterations after the first read again, `r_1 = reinject / 2` and less in later
            ones: from 0 (not included) to 2. What is read changes, not what is summed.
        use_igate (`bool`, defaults to `True`):
            One router per iteration. `False` uses one router, on the current `x_t`, at every iteration.
        backbone (`str`, defaults to `"deepseek_v2"`):
            The family of transformers whose attention, rotary embedding and norms are used: `"deepseek_v2"`,
            `"deepseek_v3"`, `"qwen2_moe"`, `"qwen3_moe"`, `"olmoe"`, `"mixtral"`, `"llama"`, `"qwen3"`, `"glm4_moe"`,
            `"minimax_m2"`, `"granitemoe"`, `"ernie4_5_moe"` or `"hunyuan_v1_moe"`. Fields of that family's attention
            keep its names. `"qwen2_moe"` gates its shared experts by a sigmoid. `"glm4_moe"` and `"minimax_m2"` rotate
            `rope_parameters["partial_rotary_factor"]` of a head.
        n_routed_experts (`int`, *optional*, defaults to 64):
            Number of routed experts N of a sparse layer. `None` makes every layer dense.
        n_shared_experts (`int`, *optional*, defaults to 1):
            Number of experts that see every token at every iteration, fused into one MLP of width
            `n_shared_experts * moe_intermediate_size`. `None` or 0 for none.
        shared_expert_intermediate_size (`int`, *optional*):
            Width of that MLP where it is another; 0 for none.
        num_experts_per_tok (`int`, defaults to 4):
            Number of routed experts K chosen per token **and iteration**.
        moe_intermediate_size (`int`, defaults to 1407):
            Width of one expert.
        first_k_dense_replace (`int`, defaults to 0):
            The first this many layers are plain dense DeepSeek-V2 layers.
        moe_layer_freq (`int`, defaults to 1):
            Layers whose index is not a multiple of this are dense too.
        mlp_only_layers (`list[int]`, *optional*):
            Indices of further dense layers (Qwen).
        decoder_sparse_step (`int`, defaults to 1):
            Layers whose index plus one is not a multiple of this are dense too (Qwen).
        scoring_func (`str`, defaults to `"softmax"`):
            `"softmax"` (DeepSeek-V2) or `"sigmoid"` (DeepSeek-V3).
        topk_method (`str`, defaults to `"greedy"`):
            `"greedy"`: the K best scores. `"group_limited_greedy"` (DeepSeek-V2): only experts of the `topk_group`
            groups with the best single expert. `"noaux_tc"` (DeepSeek-V3): a selection bias per expert is added to
            the scores that choose (not to those that weigh), and the groups with the best two experts are kept.
        n_group (`int`, *optional*, defaults to 1):
            Number of equal groups the experts are split into. Read by the group-limited methods only.
        topk_group (`int`, *optional*, defaults to 1):
            Number of groups a token may choose from.
        norm_topk_prob (`bool`, defaults to `False`):
            Divide the K weights by their sum (with K > 1).
        routed_scaling_factor (`float`, defaults to 1.0):
            Factor on the routing weights. As in the official code, it is not applied to weights that `norm_topk_prob`
            has normalised; with `scoring_func="sigmoid"` it always is, as in DeepSeek-V3.
        aux_loss_alpha (`float`, defaults to 0.001):
            Coefficient of the load-balancing loss of each iteration of each sparse layer, added to the loss in
            training. 0 turns it off. `router_aux_loss_coef` is an alias.
        seq_aux (`bool`, defaults to `True`):
            Balance the experts within each sequence; `False` balances them over the batch.
        router_z_loss_coef (`float`, defaults to 0.0):
            Coefficient of the router z-loss (mean squared log-partition of the router logits) in training.
        num_key_value_heads (`int`, *optional*):
            Number of key and value heads, `num_attention_heads` by default. Multi-head latent attention (the two
            DeepSeek backbones) has one latent for all heads: there it is `num_attention_heads` whatever is passed.
        sliding_window (`int`, *optional*):
            Width of the attention window of all layers or, for `"qwen2_moe"` and `"qwen3"`, of those that
            `layer_types` calls `"sliding_attention"`.
        qkv_bias (`bool`, defaults to `True`):
            Whether the query, key and value projections of `"qwen2_moe"` have a bias. (`attention_bias` elsewhere.)
        clip_qkv (`float`, *optional*):
            Bound on queries, keys and values of `"olmoe"`.
        rope_interleave (`bool`, defaults to `True`):
            Whether `"deepseek_v3"` rotates neighbouring dimensions, rather than those half a head apart.
        use_qk_norm (`bool`, defaults to `False`):
            Whether queries and keys of `"glm4_moe"` have norms.
        attention_multiplier (`float`, defaults to 1.0):
            Factor on the products of queries and keys of `"granitemoe"`. (`head_dim ** -0.5` elsewhere.)
        embedding_multiplier (`float`, defaults to 1.0):
            Factor on the embeddings, given ones too: the first layer sees `embedding_multiplier * embed_tokens(ids)`.
        residual_multiplier (`float`, defaults to 1.0):
            Factor on the output of attention, of a dense MLP and of each iteration, before anything is added to it:
            `h = x + residual_multiplier * attention(input_layernorm(x))`, and every `y_t` above includes it.
        logits_scaling (`float`, defaults to 1.0):
            Divisor of the logits: `lm_head(norm(x) / logits_scaling)`.

    ```python
    >>> from configuration_coe import CoeConfig

    >>> chain = CoeConfig(n_routed_experts=64, num_experts_per_tok=4, inner_iter=2)
    >>> single = CoeConfig(n_routed_experts=64, num_experts_per_tok=8, inner_iter=1)
    >>> chain.residual_rule
    'inner'
    >>> round(chain.expert_combinations / single.expert_combinations, 1)
    91.2
    ```
    """

    model_type = "coe"
    attribute_map = {
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "router_aux_loss_coef": "aux_loss_alpha",
        "use_bias": "attention_bias",  # as ERNIE's attention calls it
    }
    # The chain keeps DeepSeek-V2's module names, routers are replicated, and one module call is one iteration.
    # `_complete_plans` fits them to the fields.
    base_model_tp_plan = {
        module: style for module, style in DeepseekV2Config.base_model_tp_plan.items() if ".mlp." in module
    }
    base_model_ep_plan = DeepseekV2Config.base_model_ep_plan.copy()
    base_model_pp_plan = DeepseekV2Config.base_model_pp_plan.copy()

    inner_iter: int = 2
    inner_residual: bool = True
    outer_residual: bool = False
    init_residual: bool = False
    prenorm_residual: bool = False
    upcycling: str | None = None
    chain_layers: list[int] | None = None
    iteration_norm: bool = False
    branch_norm: bool = False
    residual_scale: int | float | None = None
    reinject: int | float | None = None
    use_igate: bool = True
    backbone: str = "deepseek_v2"
    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 1
    shared_expert_intermediate_size: int | None = None
    kv_lora_rank: int | None = 512
    qk_nope_head_dim: int | None = 128
    qk_rope_head_dim: int | None = 64
    v_head_dim: int | None = 128
    num_experts_per_tok: int | None = 4
    moe_layer_freq: int = 1
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: int = 1
    scoring_func: str = "softmax"
    n_group: int | None = 1
    topk_group: int | None = 1
    routed_scaling_factor: int | float = 1.0
    aux_loss_alpha: int | float = 0.001
    seq_aux: bool = True
    router_z_loss_coef: int | float = 0.0
    sliding_window: int | None = None
    qkv_bias: bool = True
    clip_qkv: int | float | None = None
    rope_interleave: bool = True
    use_qk_norm: bool = False
    attention_multiplier: int | float = 1.0
    embedding_multiplier: int | float = 1.0
    residual_multiplier: int | float = 1.0
    logits_scaling: int | float = 1.0

    def __post_init__(self, **kwargs):
        model_type = kwargs.pop("model_type", self.model_type)
        if model_type not in (self.model_type, OFFICIAL_MODEL_TYPE):
            raise ValueError(
                f"`model_type` is {model_type!r}, which is not a Chain-of-Experts configuration "
                f"({self.model_type!r} or {OFFICIAL_MODEL_TYPE!r}). Load this folder with `AutoConfig` instead."
            )
        if "residual" in kwargs:
            self._set_residual(kwargs.pop("residual"))
        # The base class completes these dictionaries in place; the caller's own must stay as they are.
        self.rope_parameters = copy.deepcopy(self.rope_parameters)
        if "rope_scaling" in kwargs:
            kwargs["rope_scaling"] = copy.deepcopy(kwargs["rope_scaling"])
        if self.backbone not in BACKBONES:
            raise ValueError(f"`backbone` is {self.backbone!r}; choose one of {tuple(BACKBONES)}.")
        backbone = BACKBONES[self.backbone]
        if backbone.has_latent_attention or self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if backbone.has_window_by_layer and kwargs.get("layer_types") is None:
            kwargs["layer_types"] = ["full_attention"] * self.num_hidden_layers
        head_dim = self.head_dim
        if backbone.has_latent_attention:
            self._check_latent_sizes()
            super().__post_init__(**kwargs)
        else:
            self.qk_nope_head_dim = self.qk_rope_head_dim = 0  # the parent computes with them
            super().__post_init__(**kwargs)
            self.head_dim = self._default_head_dim() if head_dim is None else head_dim
            for name in LATENT_SIZES:
                setattr(self, name, None)
        self.validate_chain()
        self.validate_routing()
        self._complete_plans()

    def _set_residual(self, residual: str) -> None:
        """Sets the flags that mean what the first official configurations call `residual`."""
        if residual not in _OFFICIAL_RESIDUALS:
            raise ValueError(f"`residual` is {residual!r}; choose one of {tuple(_OFFICIAL_RESIDUALS)}.")
        selecting = RESIDUAL_RULES[_OFFICIAL_RESIDUALS[residual]]
        for name in ("inner_residual", "outer_residual", "init_residual", "prenorm_residual"):
            default = getattr(CoeConfig, name)
            wanted = selecting.get(name, default)
            if getattr(self, name) not in (default, wanted):
                raise ValueError(
                    f"`residual={residual!r}` contradicts the flags, got {self._residual_flags()}. Remove `residual`, "
                    "or leave the flags at their defaults."
                )
            setattr(self, name, wanted)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == OFFICIAL_MODEL_TYPE:
            # `CoeForCausalLM.from_pretrained` would warn of another name than this class's.
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    def _complete_plans(self) -> None:
        """Adds the backbone's attention to the plans of parallelism, and takes from them what this model lacks."""
        attention_plan = {
            module: style
            for module, style in (BACKBONES[self.backbone].config_class.base_model_tp_plan or {}).items()
            if ".self_attn." in module
        }
        missing = []
        if BACKBONES[self.backbone].has_latent_attention:
            missing.append("q_b_proj" if self.q_lora_rank is None else "q_proj")
        if not self.num_sparse_layers:
            missing.append("mlp.experts")
        if not self.num_sparse_layers or not self.shared_expert_width:
            missing.append("mlp.shared_experts")
        if self.num_sparse_layers == self.num_hidden_layers:
            missing += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]

        def present(plan: dict[str, str]) -> dict[str, str]:
            return {
                module: style for module, style in plan.items() if not any(f".{name}" in module for name in missing)
            }

        # Before 5.21, transformers has put tied embeddings into the plan of this configuration by now.
        self.base_model_tp_plan = present(attention_plan | self.base_model_tp_plan)
        self.base_model_ep_plan = present(self.base_model_ep_plan)

    def validate_vocabulary(self) -> None:
        """Raises `ValueError` where padding has no embedding. Part of `@strict` validation."""
        _at_least(self, 1, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        padding = self.pad_token_id
        if padding is not None and not -self.vocab_size <= padding < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` is {padding}, beyond `vocab_size={self.vocab_size}`. Set it to a token of the "
                "vocabulary, or to None."
            )

    def validate_multipliers(self) -> None:
        """Raises `ValueError` where a factor is not greater than 0. Part of `@strict` validation."""
        for name in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be greater than 0.")

    def validate_stabilisers(self) -> None:
        """Raises `ValueError` where a factor of the chain is out of range. Part of `@strict` validation."""
        if self.residual_scale is not None and not self.residual_scale > 0:
            raise ValueError(
                f"`residual_scale` is {self.residual_scale}; it must be greater than 0, or None to scale nothing."
            )
        if self.reinject is not None and not 0 < self.reinject <= 2:
            raise ValueError(
                f"`reinject` is {self.reinject}; it must be greater than 0 and at most 2, or None to mix nothing in."
            )

    def validate_attention(self) -> None:
        """Raises `ValueError` where sizes do not fit each other, or follow from others and were left behind. Part of
        `@strict` validation."""
        if not BACKBONES[self.backbone].has_latent_attention:
            _at_least(self, 1, "head_dim", "num_key_value_heads")
            if self.num_attention_heads % self.num_key_value_heads:
                raise ValueError(
                    f"`num_attention_heads` is {self.num_attention_heads}, no multiple of `num_key_value_heads="
                    f"{self.num_key_value_heads}`. Set `num_key_value_heads` to a divisor."
                )
            return
        self._check_latent_sizes()
        for name, source, value in (
            ("num_key_value_heads", "num_attention_heads", self.num_attention_heads),
            ("head_dim", "qk_rope_head_dim", self.qk_rope_head_dim),
            ("qk_head_dim", "qk_nope_head_dim + qk_rope_head_dim", self.qk_nope_head_dim + self.qk_rope_head_dim),
        ):
            if getattr(self, name) != value:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but `{source}` is {value}: it was changed after "
                    f"construction. Set `{name}` to {value} too."
                )

    def validate_architecture(self) -> None:
        """Takes any number of heads: they may together be of another width than the model, which DeepSeek-V2 forbids.
        Part of `@strict` validation."""

    def _default_head_dim(self) -> int:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}, no multiple of `num_attention_heads="
                f"{self.num_attention_heads}`. Set `head_dim`, or `num_attention_heads` to a divisor."
            )
        return self.hidden_size // self.num_attention_heads

    def _check_latent_sizes(self) -> None:
        _at_least(self, 1, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

    def validate_chain(self) -> None:
        """Raises `ValueError` where the fields of the chain exclude each other. Part of `@strict` validation."""
        _at_least(self, 1, "inner_iter", "moe_layer_freq", "decoder_sparse_step", "moe_intermediate_size")
        _at_least(self, 0, "first_k_dense_replace", "aux_loss_alpha", "router_z_loss_coef")
        if self.init_residual and (self.inner_residual or self.outer_residual or self.prenorm_residual):
            raise ValueError(
                f"`init_residual=True` excludes the other residual flags, got {self._residual_flags()}. "
                "Set `inner_residual`, `outer_residual` and `prenorm_residual` to False."
            )
        if self.prenorm_residual and (self.outer_residual or not self.inner_residual):
            raise ValueError(
                f"`prenorm_residual=True` already adds the layer's input and feeds each iteration its predecessor's "
                f"sum, got {self._residual_flags()}. Set `inner_residual=True` and `outer_residual=False`."
            )
        if self.upcycling is not None:
            if self.upcycling not in UPCYCLINGS:
                raise ValueError(f"`upcycling` is {self.upcycling!r}; choose one of {UPCYCLINGS}, or None.")
            if self.outer_residual or self.init_residual or self.prenorm_residual or not self.inner_residual:
                raise ValueError(
                    f"`upcycling={self.upcycling!r}` is a residual rule of its own, got {self._residual_flags()}. "
                    "Leave these flags at their defaults."
                )
            if self.inner_iter < 2 or not self.use_igate:
                raise ValueError(
                    f"`upcycling={self.upcycling!r}` needs two iterations or more and a router for each, got "
                    f"`inner_iter={self.inner_iter}` and `use_igate={self.use_igate}`. One iteration that keeps the "
                    "source's function is `inner_iter=1` with `prenorm_residual=True`."
                )
        if self.chain_layers is None:
            return
        if self.residual_rule not in ("prenorm", *UPCYCLINGS):
            raise ValueError(
                f"`chain_layers` leaves the other layers on the pre-norm stream, which the residual rule "
                f"{self.residual_rule!r} does not keep. Set `prenorm_residual=True` or `upcycling`, or "
                "`chain_layers=None`."
            )
        sparse = [layer_idx for layer_idx in range(self.num_hidden_layers) if self._has_experts(layer_idx)]
        if wrong := sorted(set(self.chain_layers) - set(sparse)):
            raise ValueError(f"`chain_layers` holds {wrong}, which are no sparse layers. These are: {sparse}.")

    def validate_routing(self) -> None:
        """Raises `ValueError` where a token could not choose its K experts. Part of `@strict` validation."""
        if self.scoring_func not in SCORING_FUNCTIONS:
            raise ValueError(f"`scoring_func` is {self.scoring_func!r}; choose one of {SCORING_FUNCTIONS}.")
        if self.topk_method not in TOPK_METHODS:
            raise ValueError(f"`topk_method` is {self.topk_method!r}; choose one of {TOPK_METHODS}.")
        if not self.routed_scaling_factor > 0:
            raise ValueError(f"`routed_scaling_factor` is {self.routed_scaling_factor}; it must be greater than 0.")
        for name in ("n_shared_experts", "shared_expert_intermediate_size"):
            if getattr(self, name) is not None:
                _at_least(self, 0, name)
        if self.n_routed_experts is None:
            return
        _at_least(self, 1, "n_routed_experts", "num_experts_per_tok")
        experts, top_k, chosen = self.n_routed_experts, self.num_experts_per_tok, self._num_ranked_experts
        times = "" if chosen == top_k else f" in each of `inner_iter={self.inner_iter}` iterations"
        if chosen > experts:
            raise ValueError(
                f"`num_experts_per_tok` is {top_k}{times}, but there are only `n_routed_experts={experts}` experts to "
                f"choose from. Set it to {experts * top_k // chosen} or less."
            )
        if self.topk_method == "greedy":
            return
        groups = 1 if self.n_group is None else self.n_group
        chosen_groups = 1 if self.topk_group is None else self.topk_group
        if groups < 1 or experts % groups:
            raise ValueError(
                f"`n_routed_experts={experts}` experts cannot be split into `n_group={groups}` equal groups. "
                "Set `n_group` to a divisor."
            )
        if not 1 <= chosen_groups <= groups:
            raise ValueError(f"`topk_group` is {chosen_groups}; it must lie between 1 and `n_group={groups}`.")
        reachable = chosen_groups * (experts // groups)
        if chosen > reachable:
            raise ValueError(
                f"`num_experts_per_tok` is {top_k}{times}, but `topk_group={chosen_groups}` of `n_group={groups}` "
                f"groups hold only {reachable} experts. Choose more groups or at most {reachable} experts."
            )

    def _residual_flags(self) -> str:
        names = ("inner_residual", "outer_residual", "init_residual", "prenorm_residual")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @property
    def residual_rule(self) -> ResidualRule:
        """Name of the residual rule that the flags and `upcycling` select (see the table of the class)."""
        flags = ("inner_residual", "outer_residual", "init_residual", "prenorm_residual", "upcycling")
        fields = {name: value for name in flags if (value := getattr(self, name)) != getattr(CoeConfig, name)}
        return next((rule for rule, selecting in RESIDUAL_RULES.items() if selecting == fields))

    def is_sparse_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` holds experts rather than a dense MLP."""
        return self.n_routed_experts is not None and self._has_experts(layer_idx)

    def _has_experts(self, layer_idx: int) -> bool:
        return (
            layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
            and layer_idx not in (self.mlp_only_layers or ())
            and (layer_idx + 1) % self.decoder_sparse_step == 0
        )

    def num_iterations(self, layer_idx: int) -> int:
        """Number of iterations of layer `layer_idx`: 0 where it is dense, 1 where it is not chained."""
        if not self.is_sparse_layer(layer_idx):
            return 0
        return self.inner_iter if self._is_chained(layer_idx) else 1

    def residual_rule_of(self, layer_idx: int) -> ResidualRule:
        """Name of the residual rule of sparse layer `layer_idx`: `"prenorm"` where it is not chained."""
        return self.residual_rule if self._is_chained(layer_idx) else "prenorm"

    def _is_chained(self, layer_idx: int) -> bool:
        return self.chain_layers is None or layer_idx in self.chain_layers

    def experts_per_iteration(self, layer_idx: int) -> int:
        """Number of routed experts that a token uses in each iteration of layer `layer_idx`: 0 where it is dense."""
        iterations = self.num_iterations(layer_idx)
        if iterations == 0:
            return 0
        return self._num_ranked_experts // iterations if self.upcycling == "split" else self.num_experts_per_tok

    def iteration_multiplier(self, layer_idx: int) -> float:
        """Factor on the output of each iteration of sparse layer `layer_idx`: `residual_multiplier` and, where there
        is one, the formula of `residual_scale`."""
        if self.residual_scale is None:
            return self.residual_multiplier
        divisor = self.num_iterations(layer_idx) * self.num_hidden_layers**0.5
        return self.residual_multiplier * self.residual_scale / divisor

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers that hold experts."""
        return [layer_idx for layer_idx in range(self.num_hidden_layers) if self.is_sparse_layer(layer_idx)]

    @property
    def num_sparse_layers(self) -> int:
        """Number of layers that hold experts."""
        return len(self.sparse_layers)

    @property
    def query_key_norms(self) -> Literal["all heads", "each head", "each head, rotated"] | None:
        """The norms that queries and keys have: `Backbone.query_key_norms`, or none where a field leaves them out."""
        backbone = BACKBONES[self.backbone]
        has_norms = backbone.norms_field is None or getattr(self, backbone.norms_field)
        return backbone.query_key_norms if has_norms else None

    @property
    def shared_expert_width(self) -> int:
        """Width of the MLP of all shared experts, 0 where there are none."""
        if not self.n_shared_experts:
            return 0
        if self.shared_expert_intermediate_size is not None:
            return self.shared_expert_intermediate_size
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def expert_combinations(self) -> int:
        """Number of ways in which one chained layer can choose its experts for a token: `binomial(N, K) ** C`, or,
        with `upcycling="split"`, where no expert is used twice, the product of `binomial(N - t * K, K)`. 1 where all
        layers are dense."""
        if self.n_routed_experts is None:
            return 1
        used = self.num_experts_per_tok if self.upcycling == "split" else 0
        return prod(comb(self.n_routed_experts - t * used, self.num_experts_per_tok) for t in range(self.inner_iter))

    @property
    def uses_all_experts(self) -> bool:
        """Whether the choices of each router cover all experts, over the iterations of a split layer, so that every
        token uses all of them and there is no load to balance. False where all layers are dense."""
        return self.num_sparse_layers > 0 and self._num_ranked_experts == self.n_routed_experts

    @property
    def expert_flops_per_token(self) -> int:
        """Forward floating-point operations (2 per multiply-add) that one token costs in the expert matrices, routed
        and shared, of all sparse layers and iterations. The routers are not counted."""
        width = 0
        for layer_idx in self.sparse_layers:
            iterations = self.num_iterations(layer_idx)
            width += iterations * self.experts_per_iteration(layer_idx) * self.moe_intermediate_size
            width += (1 if self.upcycling == "split" else iterations) * self.shared_expert_width
        return 2 * 3 * self.hidden_size * width

    @property
    def total_parameters(self) -> int:
        """Number of parameters of the causal language model, tied embeddings counted once. Selection biases are
        buffers and not counted."""
        return self._dense_parameters + self.num_sparse_layers * (self.n_routed_experts or 0) * self._expert_parameters

    @property
    def active_parameters(self) -> int:
        """Number of parameters one token can use: all but the routed experts it does not choose. A token may choose
        an expert again in a later iteration; this counts the most it can reach, `min(N, C * K)` per layer."""
        reached = sum(
            min(self.n_routed_experts, self.num_iterations(layer_idx) * self.experts_per_iteration(layer_idx))
            for layer_idx in self.sparse_layers
        )
        return self._dense_parameters + reached * self._expert_parameters

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters of the input embedding and, where it is not tied, of the output head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def _expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def _num_ranked_experts(self) -> int:
        """Number of experts that one router ranks for a token: in a split layer those of all iterations."""
        return self.num_experts_per_tok * (self.inner_iter if self.upcycling == "split" else 1)

    @property
    def _attention_parameters(self) -> int:
        hidden, heads, backbone = self.hidden_size, self.num_attention_heads, BACKBONES[self.backbone]
        bias = int(backbone.bias is not None and getattr(self, backbone.bias))
        if backbone.has_latent_attention:
            kv_out = self.kv_lora_rank + self.qk_rope_head_dim
            parameters = hidden * kv_out + bias * kv_out + self.kv_lora_rank
            parameters += self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
            parameters += heads * self.v_head_dim * hidden + bias * hidden
            if self.q_lora_rank is None:
                return parameters + hidden * heads * self.qk_head_dim
            return parameters + (hidden + 1 + bias) * self.q_lora_rank + self.q_lora_rank * heads * self.qk_head_dim
        query, key = heads * self.head_dim, self.num_key_value_heads * self.head_dim
        each_head = 2 * self.head_dim
        norms = {None: 0, "all heads": query + key, "each head": each_head, "each head, rotated": each_head}
        biases = bias * (query + 2 * key + (hidden if backbone.bias_covers_output else 0))
        return 2 * hidden * (query + key) + biases + norms[self.query_key_norms]

    @property
    def _dense_parameters(self) -> int:
        """All parameters but the routed experts."""
        hidden, mlp_bias = self.hidden_size, int(self.mlp_bias)

        def mlp(width: int) -> int:
            return 3 * hidden * width + mlp_bias * (2 * width + hidden)

        parameters = self.embedding_parameters + hidden
        parameters += self.num_hidden_layers * (self._attention_parameters + 2 * hidden)
        for layer_idx in range(self.num_hidden_layers):
            if not self.is_sparse_layer(layer_idx):
                parameters += mlp(self.intermediate_size)
                continue
            iterations = self.num_iterations(layer_idx)
            parameters += (iterations if self.use_igate else 1) * self.n_routed_experts * hidden
            if self.shared_expert_width:
                parameters += mlp(self.shared_expert_width)
                parameters += hidden if BACKBONES[self.backbone].gates_shared_experts else 0
            # Scales and norms.
            parameters += (iterations - 1) * hidden * ((self.upcycling is not None) + self.iteration_norm)
            parameters += iterations * hidden * self.branch_norm
        return parameters


def _at_least(config: CoeConfig, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None or not value >= minimum:
            raise ValueError(f"`{name}` is {value}; it must be {minimum} or more.")


__all__ = ["BACKBONES", "RESIDUAL_RULES", "Backbone", "CoeConfig"]
