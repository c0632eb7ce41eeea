"""`coe-plan` against training steps that are measured here, a model that two processes share, and sums by hand."""

import json
import math
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils.flop_counter import FlopCounterMode

from modeling_coe import CoeConfig, CoeForCausalLM
from modeling_coe.command_line import InputError
from modeling_coe.planning import (
    Layout,
    LayoutSettings,
    PlanSettings,
    Precision,
    activation_bytes,
    forward_flops,
    launch_line,
    layouts,
    load_config,
    main,
    memory,
    model_parameters,
    parse_bytes,
    plan,
    step_seconds,
    traffic,
)

from .helpers import ROOT, enable_checkpointing, random_ids, tiny_config, tiny_model
from .planning_worker import peak_bytes
from .ranks import run_module, run_ranks


SHAPE = ROOT / "examples" / "configs" / "coe-7b-a1b.json"
PAGE = ROOT / "examples" / "SCALING.md"

# Wide enough that what is not counted (a number a token, say) is little beside what is. Sequences of 128 tokens and
# more, and equal widths of keys and values, which flash attention of the CPU needs.
WIDE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 3,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "initializer_range": 0.02,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
SHAPES = {
    "latent, C = 2": {"v_head_dim": 32},
    "latent, compressed queries": {"q_lora_rank": 48, "v_head_dim": 32, "n_shared_experts": 2},
    "dense layers first": {"first_k_dense_replace": 2, "v_head_dim": 32},
    "deepseek_v3": {"backbone": "deepseek_v3", "v_head_dim": 40, "scoring_func": "sigmoid"},
    "split": {"backbone": "qwen3_moe", "upcycling": "split", "num_experts_per_tok": 2, **GROUPED},
    "refine": {"backbone": "qwen3_moe", "upcycling": "refine", **GROUPED},
    "gated shared experts": {"backbone": "qwen2_moe", **GROUPED},
    "norms of all heads, C = 3": {"backbone": "olmoe", "inner_iter": 3, "prenorm_residual": True, **GROUPED},
    "stabilised": {"v_head_dim": 32, "prenorm_residual": True, "iteration_norm": True, "branch_norm": True},
    "no shared experts": {"backbone": "mixtral", "n_shared_experts": 0, **GROUPED},
    "dense": {"backbone": "llama", "n_routed_experts": None, **GROUPED},
}


def settings(**options) -> PlanSettings:
    return PlanSettings(**{"devices": 1, "batch_size": 4, "micro_batch_size": 2, "sequence_length": 128, **options})


# ---- A step that is measured ----------------------------------------------------------------------------------------


def wide_model(experts: str = "torch_grouped_mm", **overrides) -> CoeForCausalLM:
    """A model that computes its experts as on a GPU."""
    model = tiny_model(**{**WIDE, **overrides}).train()
    model.set_experts_implementation(experts)
    return model


def saved_bytes(model: CoeForCausalLM, input_ids: torch.Tensor) -> int:
    """Bytes of all storages that autograd keeps, but for weights and buffers."""
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
    assert loss.requires_grad  # the graph lives, and with it all that is counted
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape, dtype):
    """Of both precisions of FSDP2, whose modules see weights of the one dtype or the other."""
    model = wide_model(**SHAPES[shape]).to(dtype)
    input_ids = random_ids(2, 192)
    itemsize = dtype.itemsize
    expected = activation_bytes(model.config, batch_size=2, length=192, precision=Precision(*2 * [itemsize]))
    logits = 4 * input_ids.numel() * model.config.vocab_size
    # What is kept has the probabilities of the loss once, its largest moment three such tensors.
    assert expected - 2 * logits == pytest.approx(saved_bytes(model, input_ids), rel=0.1)
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()  # there are gradients from here on
    measured = peak_bytes(lambda: model(input_ids, labels=input_ids, use_cache=False).loss.backward())
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [*({name: each} for name, each in SHAPES.items() if name != "dense"), {"large vocabulary": {"vocab_size": 4096}}],
)
def test_activations_with_checkpointing(shape, dtype):
    (overrides,) = shape.values()
    model = wide_model(**overrides).to(dtype)
    enable_checkpointing(model, {"use_reentrant": False})
    input_ids = random_ids(2, 192)
    expected = activation_bytes(
        model.config, batch_size=2, length=192, precision=Precision(*2 * [dtype.itemsize]), checkpointing=True
    )
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    measured = peak_bytes(lambda: model(input_ids, labels=input_ids, use_cache=False).loss.backward())
    assert expected == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("shape", ["latent, C = 2", "split"])
def test_autocast(monkeypatch, shape):
    """Autocast leaves the stream in float32, and its copies of weights are counted beside."""
    monkeypatch.setattr("modeling_coe.experts._is_computed_here", lambda *_: False)  # as on a GPU
    model = wide_model("grouped_mm", **SHAPES[shape])
    input_ids = random_ids(2, 192)
    planned = memory(
        model.config,
        Layout("ddp"),
        settings(sequence_length=192),
        model_parameters(model.config),
    )

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()

    step()
    assert planned.gathered + planned.activations == pytest.approx(peak_bytes(step), rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", ["latent, C = 2", "split", "dense layers first"])
def test_a_whole_step(shape, checkpointing):
    """Weights, gradients and optimizer to the byte; all of it at once within a tenth, in the second micro-batch."""
    model = wide_model(**SHAPES[shape])
    if checkpointing:
        enable_checkpointing(model, {"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters())
    batches = random_ids(2, 2, 128)

    def accumulate(batches):
        optimizer.zero_grad()
        for input_ids in batches:
            model(input_ids, labels=input_ids, use_cache=False).loss.backward()

    accumulate(batches)
    optimizer.step()
    planned = memory(
        model.config,
        Layout("ddp"),
        settings(dtype="float32", gradient_checkpointing=checkpointing),
        model_parameters(model.config),
    )
    weights, gradients = list(model.parameters()), [each.grad for each in model.parameters()]
    states = [each for state in optimizer.state.values() for each in state.values() if each.dim() > 0]
    assert planned.weights == sum(each.nbytes for each in weights)
    assert planned.gradients == sum(each.nbytes for each in gradients)
    assert planned.optimizer == sum(each.nbytes for each in states)
    assert planned.gathered == 0

    held = planned.weights + planned.optimizer
    optimizer.zero_grad()
    del gradients
    assert planned.total == pytest.approx(held + peak_bytes(lambda: accumulate(batches)), rel=0.1)
    optimizer.zero_grad()
    # With one micro-batch gradients come as activations go.
    assert held + peak_bytes(lambda: accumulate(batches[:1])) < 1.1 * planned.total


def test_the_experts_of_the_cpu_keep_less():
    """Its kernels keep gate and up of a row alone, and compute the rest again."""
    input_ids = random_ids(2, 192)
    kept = {each: saved_bytes(wide_model(experts=each), input_ids) for each in ("torch_grouped_mm", "grouped_mm")}
    config = tiny_config(**WIDE)
    rows = input_ids.numel() * config.num_experts_per_tok * config.inner_iter * config.num_hidden_layers
    row = 4 * (2 * config.hidden_size + 2 * config.moe_intermediate_size)
    assert kept["torch_grouped_mm"] - kept["grouped_mm"] == pytest.approx(rows * row, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_flops(shape):
    model = wide_model(experts="eager", **SHAPES[shape])
    model.set_attn_implementation("eager")  # whose products can be counted: all pairs, no half of them
    config, input_ids = model.config, random_ids(2, 48)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
        forward = counter.get_total_flops()
        loss.backward()
    flops = forward_flops(config, 48, model_parameters(config))
    gates = 2 * config.hidden_size * 2 * config.num_sparse_layers if config.backbone == "qwen2_moe" else 0
    assert (flops.total + flops.attention + gates) * input_ids.numel() == forward
    # The input of the model has no gradient, which saves nothing: it is looked up.
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=1e-3)


# ---- Layouts --------------------------------------------------------------------------------------------------------


def test_two_processes(tmp_path):
    """What a process holds of every parameter, needs in a step, and exchanges, in transformers' own layouts."""
    pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers 5.23 has these layouts")
    # Mostly experts. Widths that do not divide: FSDP gives the first process the larger part.
    shape = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 257, "vocab_size": 1025}
    config = tiny_config(**{**WIDE, **shape, "num_hidden_layers": 7, "first_k_dense_replace": 1, "v_head_dim": 32})
    CoeForCausalLM(config).save_pretrained(tmp_path)
    sizes = [{"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}]
    cases = [({"fsdp_mixed_precision": mixed}, each) for mixed in (False, True) for each in sizes]
    cases.append(({}, {"tp_size": 2}))
    asked = json.dumps([mixed | each for mixed, each in cases])
    run = run_ranks(run_module, "tests.planning_worker", "--model", tmp_path, "--layouts", asked)
    assert run.returncode == 0, run.stdout + run.stderr
    reports = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("[{")))
    parameters = model_parameters(config)
    for (mixed, each), report in zip(cases, reports, strict=True):
        layout, is_mixed = Layout("fsdp", **each), mixed.get("fsdp_mixed_precision", False)
        options = settings(devices=2, batch_size=2, micro_batch_size=1, dtype="bfloat16" if is_mixed else "float32")
        planned = memory(config, layout, options, parameters)
        assert planned.weights == 4 * report["held"]
        if layout.tp_size == 1:  # collectives of the CPU end when they please: the peak differs from step to step
            assert planned.gathered + planned.activations == pytest.approx(report["peak"], rel=0.15)
        sent = traffic(config, layout, options, parameters).exchanged
        # Of both processes, and with what each sends to itself, whatever the routers choose.
        assert report["sent"] == 2 * 2 * sent
        # The sum by hand: forward and back, of activations and of gradients, 2 iterations, 6 layers, 4 experts.
        itemsize = 2 if is_mixed else 4
        assert sent == (4 * 2 * 6 * 4 * 128 * 256 * itemsize / 2 if layout.ep_size > 1 else 0)


def test_counts_agree_with_the_configuration():
    config = load_config(str(SHAPE))
    parameters = model_parameters(config)
    assert sum(math.prod(each.shape) for each in parameters) == config.total_parameters
    # Everything divides by 8: each device has an eighth, however the experts are shared.
    for layout in (Layout("fsdp", 1, 8), Layout("fsdp", 1, 8, ep_size=4), Layout("fsdp", 4, 8, ep_size=8)):
        held = memory(config, layout, settings(devices=8), parameters)
        assert (held.weights, held.gradients, held.optimizer) == tuple(
            each * config.total_parameters // 8 for each in (4, 4, 8)
        )
    held = memory(config, Layout("zero-3", fsdp_size=8), settings(devices=8), parameters)
    assert (held.weights, held.gradients) == (6 * config.total_parameters // 8, 2 * config.total_parameters // 8)
    held = memory(config, Layout("ddp", 8), settings(devices=8), parameters)
    assert (held.weights, held.gradients) == (4 * config.total_parameters, 8 * config.total_parameters)


def test_gathered_weights():
    """Two layers and the head in bfloat16; the gradients of a layer in bfloat16 and, as they are reduced, float32, of
    which an eighth stays."""
    config = load_config(str(SHAPE))
    head = config.vocab_size * config.hidden_size + config.hidden_size
    head += config.vocab_size * config.hidden_size  # the embedding
    without = replace_config(config, num_hidden_layers=config.num_hidden_layers - 1)
    layer = config.total_parameters - without.total_parameters
    held = memory(config, Layout("fsdp", 1, 8), settings(devices=8), model_parameters(config))
    assert held.gathered == 2 * (2 * layer + head) + (2 + 4) * layer + 4 * layer // 8
    experts = config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size
    held = memory(config, Layout("fsdp", 1, 8, ep_size=4), settings(devices=8), model_parameters(config))
    mine = layer - experts * 3 // 4
    assert held.gathered == 2 * (2 * mine + head) + (2 + 4) * mine + 4 * layer // 8
    # Nobody else has these experts: a copy and its gradient in bfloat16, and that in float32.
    held = memory(config, Layout("fsdp", 1, 8, ep_size=8), settings(devices=8), model_parameters(config))
    dense = layer - experts
    assert held.gathered == max(
        2 * (2 * dense + head) + (2 + 4) * dense + 4 * dense // 8 + (2 + 2 + 4) * experts // 8, (2 + 2 + 4) * head
    )


def replace_config(config: CoeConfig, **fields) -> CoeConfig:
    return CoeConfig(**{**config.to_dict(), **fields})


def test_layouts_that_divide():
    config = load_config(str(SHAPE))
    names = [str(each) for each in layouts(config, settings(devices=8, batch_size=16))]
    assert names == [
        *(
            "ddp",
            "fsdp 8",
            "zero-3",
            "fsdp 8 x ep 2",
            "fsdp 8 x ep 4",
            "fsdp 8 x ep 8",
            "fsdp 4 x tp 2",
            "fsdp 2 x tp 4",
        ),
    ]
    names = [str(each) for each in layouts(config, settings(devices=16, batch_size=64))]
    assert {"replicate 2 x fsdp 8", "replicate 2 x fsdp 8 x ep 8", "fsdp 16 x ep 16", "fsdp 2 x tp 8"} <= set(names)
    for experts, largest in ((48, 16), (7, 1)):
        found = layouts(replace_config(config, n_routed_experts=experts, num_experts_per_tok=2), settings(devices=32))
        assert max(each.ep_size for each in found) == largest
    dense = replace_config(config, n_routed_experts=None)
    assert all(each.ep_size == 1 for each in layouts(dense, settings(devices=8)))
    assert [str(each) for each in layouts(config, settings(devices=1))] == ["ddp"]
    (chosen,) = layouts(config, settings(devices=16, replicate_size=2, ep_size=4))
    assert chosen == Layout("fsdp", 2, 8, ep_size=4)


# ---- Time -----------------------------------------------------------------------------------------------------------


def test_time_by_hand():
    config = load_config(str(SHAPE))
    parameters = model_parameters(config)
    options = settings(devices=16, batch_size=64, sequence_length=4096, link_efficiency=1.0, efficiency=0.5)
    flops = forward_flops(config, 4096, parameters)
    size = config.total_parameters

    def seconds(layout: Layout, **changed) -> tuple[float, float, float]:
        new = replace(options, **changed)
        return step_seconds(config, layout, new, flops, traffic(config, layout, new, parameters))

    # Over two machines of 8, all 8 links of a machine carry the ring: 400 GB/s. 2 micro-batches, each with bfloat16
    # weights twice and float32 gradients once.
    computing, moving, waiting = seconds(Layout("fsdp", 1, 16))
    tokens = 64 * 4096 / 16
    fast = flops.total - flops.routers
    assert computing == pytest.approx(3 * tokens * (fast / 989e12 + flops.routers / 67e12) / 0.5)
    assert moving == pytest.approx(2 * (2 + 2 + 4) * size * 15 / 16 / 400e9)
    assert waiting == 0
    computing_again, *_ = seconds(Layout("fsdp", 1, 16), gradient_checkpointing=True)
    assert computing_again == pytest.approx(computing * 4 / 3)
    # Copies: sharded within a machine, and each device averages its eighth over its own link, once a step.
    _, moving, _ = seconds(Layout("fsdp", 2, 8))
    assert moving == pytest.approx(2 * 8 * size * 7 / 8 / 450e9 + 2 * 4 * (size / 8) / 2 / 50e9)
    by_autocast, moving, _ = seconds(Layout("ddp", 16))
    assert by_autocast == pytest.approx(computing)
    assert moving == pytest.approx(2 * 4 * size * 15 / 16 / 400e9)
    # Experts: 15 layers of 2 iterations with 4 experts each; rows of 2048 in bfloat16, there and back, twice.
    rows = 2 * 2 * 4096 * 15 * 2 * 4
    _, _, waiting = seconds(Layout("fsdp", 1, 16, ep_size=8))
    assert waiting == pytest.approx(4 * rows * 2048 * 2 * 7 / 8 / 450e9)
    # Beyond a machine 8 of 15 others are elsewhere, behind a link of 50 GB/s.
    _, _, waiting = seconds(Layout("fsdp", 1, 16, ep_size=16))
    assert waiting == pytest.approx(4 * rows * 2048 * 2 * 15 / 16 * 8 / 15 / 50e9)


def test_the_best_layout():
    config = load_config(str(SHAPE))
    options = settings(devices=8, batch_size=512, sequence_length=4096)
    found = plan(config, options)
    assert found.best.layout == Layout("fsdp", 1, 8)
    for each in found.estimates:
        assert each.fits == (each.memory.total <= 0.9 * 80e9)
        assert each.tokens_per_second <= 989e12 * 0.4 / (3 * found.flops.total)
        assert each.flop_utilization == pytest.approx(3 * found.flops.total * each.tokens_per_second / 989e12)
    assert not found.estimates[0].fits
    # Slow links make large groups costly, and no memory leaves nothing.
    slow = plan(config, replace(options, node_bandwidth=10.0, network_bandwidth=10.0))
    assert slow.best.tokens_per_second < found.best.tokens_per_second / 5
    assert plan(config, replace(options, memory="4G")).best is None


# ---- Command --------------------------------------------------------------------------------------------------------


def test_the_command(capsys, tmp_path):
    tiny_config(max_position_embeddings=64).save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        main([str(source), "--devices", "2", "--memory", "1GiB", "--sequence-length", "64", "--batch-size", "4"])
        printed = capsys.readouterr().out
        config = tiny_config()
        assert f"{config.total_parameters:,}" in printed and f"{config.active_parameters:,}" in printed
        (best,) = [line for line in printed.splitlines() if line.startswith("best")]
        assert printed.count("fits") + 1 == len(re.findall(r"^(?:best|fits|  no) ", printed, re.MULTILINE))
        sizes = {"ddp": "examples/pretrain.py", "fsdp": "pretrain_distributed.py"}[best.split()[1]]
        assert sizes in printed.splitlines()[-1] and str(source) in printed.splitlines()[-1]
    main([str(tmp_path), "--memory", "0.1M", "--sequence-length", "64"])
    assert "Nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "layout, devices, expected",
    [
        (
            Layout("ddp", 8),
            8,
            "accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 8 examples/",
        ),
        (Layout("zero-3", fsdp_size=16), 16, "--num_processes 16 --num_machines 2 --machine_rank RANK"),
        (Layout("fsdp", 1, 8), 8, "torchrun --standalone --nproc-per-node 8 examples/pretrain_distributed.py"),
        (Layout("fsdp", 2, 8, ep_size=4), 16, "--replicate-size 2 --fsdp-size 8 --ep-size 4"),
        (Layout("fsdp", 2, 8, ep_size=4), 16, "torchrun --nnodes 2 --rdzv-backend c10d"),
        (Layout("fsdp", 1, 4, tp_size=2), 8, "--fsdp-size 4 --tp-size 2"),
    ],
)
def test_launch_lines(layout, devices, expected):
    line = launch_line("shape", layout, settings(devices=devices))
    assert expected in line
    for file in re.findall(r"examples/accelerate/\S+", line):
        assert (ROOT / file).is_file()
    # The layout can be read back.
    if layout.engine == "fsdp":
        words = shlex.split(line)
        sizes = {
            each.name: int(words[words.index("--" + each.name.replace("_", "-")) + 1])
            for each in fields(LayoutSettings)
            if "--" + each.name.replace("_", "-") in words
        }
        assert Layout("fsdp", **sizes) == layout


@pytest.mark.parametrize(
    "text, expected", [("80G", 80e9), ("80GB", 80e9), ("1.5Gi", 1.5 * 2**30), ("24GiB", 24 * 2**30)]
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "options, named",
    [
        (["--memory", "80X"], "--memory is '80X'"),
        (["--memory", "0G"], "--memory is '0G'"),
        (["--memory", "-3G"], "--memory"),
        (["--devices", "0"], "--devices is 0"),
        (["--devices", "12"], "--devices is 12, no multiple of --devices-per-node 8"),
        (["--devices", "many"], "--devices"),
        (["--micro-batch-size", "0"], "--micro-batch-size is 0"),
        (["--batch-size", "12"], "--batch-size is 12, no multiple of the 8 sequences that ddp"),
        (["--sequence-length", "8192"], "--sequence-length is 8192"),
        (["--dtype", "float16"], "float16"),
        (["--efficiency", "1.5"], "--efficiency is 1.5"),
        (["--efficiency", "nan"], "--efficiency is nan"),
        (["--peak", "0"], "--peak is 0"),
        (["--network-bandwidth", "-1"], "--network-bandwidth is -1"),
        (["--ep-size", "3"], "--ep-size is 3"),
        (["--ep-size", "16"], "--ep-size is 16, but the model has `n_routed_experts=64` and 8 devices"),
        (["--ep-size", "0"], "--ep-size is 0"),
        (["--tp-size", "16"], "--devices is 8"),
        (["--tp-size", "8"], "--dtype is bfloat16"),
        (["--fsdp-size", "4"], "--devices is 8"),
        (["--ep-size", "2", "--tp-size", "2"], "--ep-size is 2 and --tp-size 2"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_options_end_in_one_line(options, named, capsys):
    with pytest.raises(SystemExit) as exit:
        main([str(SHAPE), *options])
    message = str(exit.value)
    assert message.startswith("error: ") and named in message and "\n" not in message and message.endswith(".")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content, named",
    [
        (None, "cannot be loaded"),
        ("{", "cannot be loaded"),
        ("{}", "cannot be loaded"),
        ('{"model_type": "llama"}', "is a 'llama' model"),
        ('{"model_type": "coe", "inner_iter": 0}', "`inner_iter` is 0"),
    ],
)
def test_bad_configurations_end_in_one_line(content, named, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path), "--sequence-length", "64", "--fsdp-size", "8"])
    message = str(exit.value)
    assert message.startswith("error: ") and named in message and "\n" not in message and message.endswith(".")


def test_values_are_checked_too():
    with pytest.raises(InputError, match="--batch-size"):
        plan(tiny_config(), settings(batch_size=3))
    with pytest.raises(InputError, match="--tp-size is 2, but the model has `moe_intermediate_size=25`"):
        plan(
            tiny_config(moe_intermediate_size=25),
            settings(devices=4, tp_size=2, sequence_length=64),
        )


# ---- Pages and files ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older plans of TP keep embeddings whole"
)
def test_the_page_shows_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"```bash\n(coe-plan [^`]*?)```\n\n```\n(.*?)```", text, re.DOTALL)
    assert len(shown) >= 2
    for command, output in shown:
        main(shlex.split(command.replace("\\\n", " "))[1:])
        assert capsys.readouterr().out == output


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_files(file: Path):
    loader = pytest.importorskip("accelerate.commands.config.config_args")
    config = loader.load_config_from_file(str(file))
    assert (config.mixed_precision, config.num_machines, config.num_processes) == ("bf16", 1, 8)
    assert config.use_cpu is False and config.main_training_function == "main"
    kind = {"ddp": "MULTI_GPU", "deepspeed_zero3": "DEEPSPEED"}.get(file.stem, "FSDP")
    assert config.distributed_type == kind
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        with torch.device("meta"):
            assert wrapped in {type(each).__name__ for each in CoeForCausalLM(tiny_config()).modules()}
        states = {"fsdp2": "FULL_STATE_DICT", "fsdp2_sharded": "SHARDED_STATE_DICT"}
        assert config.fsdp_config["fsdp_state_dict_type"] == states[file.stem]
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == 3
        assert "deepspeed_moe_layer_cls_names" not in config.deepspeed_config
