"""The plan's estimate of time, compared with counted operations, closed forms and published arithmetic."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from common.generation.decoding import sample_responses, uniforms_for
from common.model import head
from common.model.forward import base_model, label_pass
from common.model.head import Targets
from common.model.loading import load_config
from common.model.lora import add_adapters
from common.model.zero import CONFIG_FOLDER
from common.runtime.options import LoraOptions, UserError
from launch.plan import timing
from launch.plan.attack import advice
from launch.plan.hardware import GPUS, LINKS, Hardware, table_of, with_measured
from launch.plan.memory import Model, Shape, Zero
from launch.plan.options import PlanOptions
from launch.plan.remedies import cached
from launch.plan.shapes import read_shape
from launch.plan.step_seconds import step_seconds
from launch.plan.time_table import machine, step_counts, time_table
from launch.plan.timing import Cluster, Decoder, Rows
from tests.conftest import REPOSITORY

SMALL = LlamaConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
    intermediate_size=176, attn_implementation="eager",
)  # fmt: skip
# Hidden size, layers, heads, key-value heads and MLP of Llama 2, and billions of parameters.
LLAMAS = {
    "7B": (4096, 32, 32, 32, 11008, 6.74), "13B": (5120, 40, 40, 40, 13824, 13.02),
    "70B": (8192, 80, 64, 8, 28672, 68.98),
}  # fmt: skip
# An iteration of 512 prompts of 256 and responses of 512 tokens, four epochs of 16 updates.
ITERATION = {
    "rollout_batch_size": 512, "global_batch_size": 32, "max_prompt_length": 256, "max_response_length": 512,
    "gradient_checkpointing": True, "compile_generation": "no",
}  # fmt: skip
UNIT = Hardware(*[1.0] * 10)
KERNELS = 40 * 32 + 39  # of a decoding step of 7B


def offloaded(**options: Any) -> dict[str, Any]:
    return {"zero_config": str(CONFIG_FOLDER / "zero3_offload.json"), **options}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of configurations, whose shapes are read once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def planned(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Options for a Llama 2 on some GPUs."""

    def options(name: str, gpus: int, **changes: Any) -> PlanOptions:
        hidden, layers, heads, keys, mlp, _ = LLAMAS[name]
        config = LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=keys, intermediate_size=mlp, vocab_size=32000, max_position_embeddings=4096,
        )  # fmt: skip
        config.save_pretrained(folder / name)
        monkeypatch.setenv("WORLD_SIZE", str(gpus))
        given = ITERATION | changes
        return PlanOptions(num_gpus=gpus, model_name_or_path=str(folder / name), **given)

    return options


def decoder(parameters: int, in_layers: int, zero: Zero, widths: dict[str, int] | None = None) -> Decoder:
    fields = dict.fromkeys(Shape.__dataclass_fields__, 0) | {"parameters": parameters, "trained": parameters}
    return Decoder(Model(Shape(**fields | (widths or {})), zero), in_layers)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A small Llama with adapters of some rank, and its plan. The head computes chunks of two tokens."""
    monkeypatch.setattr(head, "CHUNK", 2 * SMALL.vocab_size)
    SMALL.save_pretrained(tmp_path)

    def build(rank: int = 0) -> tuple[torch.nn.Module, Decoder]:
        config = load_config(str(tmp_path))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        shapes = [read_shape(str(tmp_path), scalar, rank, ("all-linear",)) for scalar in (False, True)]
        layers = shapes[1].parameters - SMALL.vocab_size * SMALL.hidden_size
        if rank:
            layers -= SMALL.hidden_size  # the scalar head's copy for training
        model = add_adapters(model, LoraOptions(lora_rank=rank), seed=0).train()
        return model, Decoder(Model(shapes[0], Zero(0, 1, size=4)), layers)

    return build


def counted(
    model: torch.nn.Module, rows: int, width: int, positions: int, backward: bool, is_summed: bool = False
) -> int:
    """Operations of matrix products, as torch counts them, in a pass with the suite's head."""
    ids = torch.randint(SMALL.vocab_size, (rows, width))
    chosen = torch.zeros(rows, width, dtype=torch.bool)
    chosen[:, -positions - 1 : -1] = True
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # torch counts none
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter, torch.set_grad_enabled(backward):
        targets = Targets(ids[chosen], is_summed=is_summed)
        logprobs = label_pass(model, ids, chosen, targets).logprobs
        if backward:
            logprobs.sum().backward()
    return counter.get_total_flops()


@pytest.mark.end_to_end
def test_forward_operations_match_torch(small):
    """Eager attention skips no half of the mask, as the kernels do for rows without a mask."""
    model, plan = small()
    rows = Rows(3, 20, positions=7, is_shared=True)
    assert timing.forward_flops(plan, rows) == pytest.approx(counted(model, 3, 20, 7, False), rel=0.01)
    causal = rows._replace(is_shared=False)
    half = 3 * 20 * 20 * 2 * 3 * 64  # rows x tokens x earlier tokens x 2 x layers x width of all heads
    assert timing.forward_flops(plan, rows) - timing.forward_flops(plan, causal) == half


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("rank", "checkpointing", "is_summed"),
    [(0, False, False), (0, True, False), (0, False, True), (4, False, False), (4, True, False)],
)
def test_training_operations_match_torch(small, rank: int, checkpointing: bool, is_summed: bool):
    model, plan = small(rank)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = Rows(3, 20, positions=18, is_shared=True, is_summed=is_summed)
    expected = counted(model, 3, 20, 18, True, is_summed)
    # The first layer's adapters have no gradient for the input of the model.
    estimated = timing.training_flops(plan, rows, checkpointing)
    assert estimated == pytest.approx(expected, rel=0.06 if rank else 0.007)


class Kernels(TorchDispatchMode):
    """Counts operations that compute: views launch nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **kwargs or {})
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not is_view and func.overloadpacket._qualified_op_name.split("::")[1] not in NO_KERNELS
        return returned


NO_KERNELS = {"empty", "empty_like", "_local_scalar_dense", "detach", "_unsafe_view"}


def kernels_per_step(layers: int, rank: int = 0) -> float:
    """Kernels of a decoding step, from samples of 9 and of 5 tokens of prompts of unlike length."""
    config = LlamaConfig(**SMALL.to_dict() | {"num_hidden_layers": layers, "attn_implementation": "sdpa"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model = base_model(add_adapters(model, LoraOptions(lora_rank=rank), seed=0))
    counts = []
    for length in (5, 9):
        with Kernels() as kernels:
            uniforms = uniforms_for(0, 0, [0, 1], length)
            sample_responses(model, [[5, 6, 7], [8]], uniforms, 1.0, 1.0, -1, 0, synced_gpus=False)
        counts.append(kernels.count)
    return (counts[1] - counts[0]) / 4


def test_kernels_of_a_decoding_step_match_the_model():
    two, four, adapted = kernels_per_step(2), kernels_per_step(4), kernels_per_step(2, rank=4)
    of_layer = (four - two) / 2
    assert of_layer == pytest.approx(timing.EAGER_KERNELS, abs=2)
    assert two - 2 * of_layer == pytest.approx(timing.OTHER_KERNELS, abs=4)
    assert (adapted - two) / 2 == pytest.approx(timing.ADAPTER_KERNELS, abs=2)


def test_collectives_by_hand():
    """Within a node the GPUs' links count, between nodes those of the nodes if they are slower."""
    hardware = replace(UNIT, node_bandwidth=100.0, network_bandwidth=400.0)
    for ranks, seconds in ((1, 0), (4, 800 * 3 / 4 / 100), (8, 800 * 7 / 8 / 100)):
        assert timing.collective(800, ranks, Cluster(hardware, 8)) == seconds
    assert timing.collective(800, 16, Cluster(hardware, 8)) == 800 * 15 / 16 / 100
    slow = replace(hardware, network_bandwidth=20.0)
    assert timing.collective(800, 32, Cluster(slow, 8)) == 800 * 3 / 4 / 20


def test_updates_by_hand():
    """1,000 parameters of 2 bytes on 4 ranks, in 3 micro-batches; links without anything to hide behind.

    Stage 0 and 1 reduce once, 2 and 3 each micro-batch; an all-reduce sends everything twice. Stages 1 and 2
    then gather the new weights, 3 gathers them for each forward and backward pass, and copies them.
    """
    hardware = replace(UNIT, matmul_flops=1e30, fp32_flops=1e30, memory_bandwidth=1e3)
    part, rows = 3 / 4, Rows(1, 1)
    for stage, sent, copied in ((0, 2, 0), (1, 2 + 1, 0), (2, 2 * 3 + 1, 0), (3, 3 + 2 * 3, 2 * 3 * 2)):
        model = decoder(1000, 900, Zero(stage, 4))
        seconds = timing.update(model, rows, 3, False, Cluster(hardware, 8))
        assert seconds["communication"] == pytest.approx(2000 * part * sent + 2000 * copied / 1e3)
        assert seconds["optimiser"] == 1000 / (4 if stage else 1) * 44 / 1e3 and not seconds["copies"]
    owner = decoder(1000, 900, Zero(2, 4, all_reduces=False))
    sent = timing.update(owner, rows, 3, False, Cluster(hardware, 8))["communication"]
    assert sent == pytest.approx(2000 * part * (3 + 1))
    offloads = decoder(1000, 900, Zero(2, 4, offloads_optimiser=True))
    seconds = timing.update(offloads, rows, 3, False, Cluster(replace(hardware, cpu_adam_rate=10.0), 8))
    assert seconds["copies"] == 4 * 2000 / 4 and seconds["optimiser"] == 1000 / 4 / 10


def test_communication_hides_behind_computation():
    """2 x 900 operations for each of three products of 7 tokens; stage 1 reduces in the last micro-batch."""
    computed = 3 * 2 * 900 * 7
    for stage, buffers, hidden in (
        (0, 1, 0),
        (1, 2, computed / 3),
        (2, 2, computed),
        (2, 1, 0),
        (3, 1, computed),
    ):
        model = decoder(10_000, 900, Zero(stage, 4, buffers=buffers))
        slow = replace(UNIT, memory_bandwidth=1e30)
        seconds = timing.update(model, Rows(1, 7), 3, False, Cluster(slow, 8))
        assert seconds["updates"] == computed
        fast = timing.update(model, Rows(1, 7), 3, False, Cluster(replace(slow, matmul_flops=1e30), 8))
        assert fast["communication"] - seconds["communication"] == pytest.approx(hidden)


def test_scoring_fetches_weights_from_ranks_or_from_the_host():
    rows = Rows(1, 7)
    hardware = replace(UNIT, matmul_flops=10.0, memory_bandwidth=1e30, host_bandwidth=10.0)
    for stage, host, sent, copied in ((2, False, 0, 0), (2, True, 0, 200), (3, False, 5 * 1500, 0)):
        model = decoder(1000, 900, Zero(stage, 4, offloads_weights=host))
        seconds = timing.scoring(model, rows, 5, Cluster(hardware, 8))
        computed = 2 * 900 * 7 / 10
        assert seconds["scoring"] == computed and seconds["copies"] == copied
        assert seconds["communication"] == max(0, sent - computed)
    offloads = decoder(1000, 900, Zero(3, 4, offloads_weights=True))
    assert timing.gathering(offloads, Cluster(hardware, 8)) == 1500 + 2000 / 4 / 10
    hpz = decoder(1000, 900, Zero(3, 4, hpz=2))
    assert timing.gathering(hpz, Cluster(hardware, 8), is_repeated=True) == 1000
    assert timing.gathering(hpz, Cluster(hardware, 8)) == 1500


def test_states_move_there_and_back():
    model = decoder(1000, 900, Zero(2, 4))
    assert timing.states_moved(model, replace(UNIT, host_bandwidth=10.0)) == 2 * 12 * 1000 / 4 / 10


def test_decoding_by_hand():
    """Weights of layers and head are read once, keys and values of every row; or the host launches slower."""
    widths = {"layers": 10, "hidden": 8, "vocabulary": 50, "keys": 4, "queries": 8}
    model = decoder(10_000, 8000, Zero(2, 4), widths)
    hardware = replace(UNIT, matmul_flops=1e30, launch_seconds=0.0, kernel_seconds=1.0)
    read, cache = 2 * (8000 + 400), 2 * 10 * 3 * 20 * 4 * 2
    kernels = 40 * 10 + 39
    assert timing.decoding_step(model, 3, 20, "eager", hardware) == read + cache + kernels
    adapted = timing.decoding_step(model, 3, 20, "eager", hardware, has_adapters=True)
    assert adapted == read + cache + kernels + 28 * 10
    assert timing.decoding_step(model, 3, 20, "compiled", hardware) == read + cache + 13 * 10 + 39
    slow = replace(hardware, launch_seconds=1000.0)
    assert timing.decoding_step(model, 3, 20, "eager", slow) == 1000 * kernels
    assert timing.decoding_step(model, 3, 20, "compiled", slow) == 1000 * 39
    computing = replace(hardware, matmul_flops=1.0)
    assert timing.decoding_step(model, 3, 20, "compiled", computing) == 2 * 8400 * 3 + cache + 169
    alone = timing.decoding_step(model, 3, 20, "vllm", hardware)
    assert alone == pytest.approx(read + cache + 130 + 0.002)
    two = timing.decoding_step(model, 3, 20, "vllm", hardware, ranks=2)
    reductions = 2 * 10 * (20e-6 + 2 * 2 * 3 * 8 / 2)
    assert two == pytest.approx((read + cache) / 2 + 130 + reductions + 0.002)


def test_tokens_per_second_of_a_7b_model_match_published_ones(planned):
    """One row on an A100: 25.5, and 107 with a compiler (pytorch.org/blog/accelerating-generative-ai-2)."""
    options = planned("7B", 1)
    shapes = [read_shape(options.model_name_or_path, scalar, 0, ()) for scalar in (False, True)]
    model = Decoder(Model(shapes[0], Zero(2, 1)), shapes[1].parameters - 32000 * 4096)
    hardware = table_of("a100_80gb", "hdr200", 8)
    for engine, speed in (("eager", 25.5), ("compiled", 107)):
        assert 1 / timing.decoding_step(model, 1, 200, engine, hardware) == pytest.approx(speed, rel=0.1)


# By arithmetic on parameters and tokens alone, at 0.45 x 312 TFLOP/s: 2 operations per parameter and token in
# each of 4 forward passes; 8 in updates of 2 models in 4 epochs, but 6 for the last matrix of a layer.
@pytest.mark.parametrize(("name", "gpus"), [("7B", 8), ("13B", 8), ("70B", 32)])
def test_an_iteration_takes_what_its_operations_take(planned, name: str, gpus: int):
    options = planned(name, gpus, **offloaded(gather_for_generation=False, offload_frozen=True))
    seconds = step_seconds(options)["step 3"].seconds
    hidden, layers, _, _, mlp, billions = LLAMAS[name]
    rate, last = gpus * 0.45 * 312e12 / (512 * 768), hidden * layers * mlp
    assert seconds["scoring"] == pytest.approx(2 * 4 * billions * 1e9 / rate, rel=0.05)
    assert seconds["updates"] == pytest.approx((8 * billions * 1e9 - 2 * last) * 2 * 4 / rate, rel=0.05)


def test_rollouts_of_a_7b_model_on_8_gpus(planned):
    """64 rows each; the host launches 1,319 kernels per token, or the GPU reads weights, keys and values."""
    options = planned("7B", 8, offload_frozen=True)
    seconds = step_seconds(options)["step 3"].seconds
    assert seconds["decode"] == pytest.approx(511 * KERNELS * 30e-6, rel=0.01)
    assert seconds["prefill"] == pytest.approx(2 * 6.6e9 * 512 * 256 / 8 / (0.45 * 312e12), rel=0.05)
    # Frozen weights come from the host once each; states of two models move to the host and back.
    assert seconds["copies"] == pytest.approx((6.74 + 6.61) * 2e9 / 25.2e9, rel=0.01)
    away = step_seconds(replace(options, offload_states=True))["step 3"].seconds
    moved = 2 * 12 * (6.74 + 6.61) * 1e9 / 8 / 25.2e9
    assert away["copies"] - seconds["copies"] == pytest.approx(moved, rel=0.01)
    compiled = step_seconds(replace(options, compile_generation="auto"))["step 3"].seconds
    columns = 768 * 64 * 2**19  # half a MiB of keys and values per token, of all columns
    per_step = 13.2e9 / 1.59e12 + columns / 1.02e12 + (13 * 32 + 39) * 3e-6
    assert compiled["decode"] == pytest.approx(511 * per_step, rel=0.01)
    halves = step_seconds(replace(options, generation_batch_size=32))["step 3"].seconds
    assert halves["decode"] == pytest.approx(2 * 511 * KERNELS * 30e-6, rel=0.01)


def test_70b_without_gathered_weights_is_bound_by_links(planned):
    """138 GB per token: 3/4 of them enter each of 4 nodes, by 100 Gb/s or 8 x 200 Gb/s, 0.75 of it used."""
    for link, network in (("ethernet100", 12.5e9), ("hdr200", 8 * 25e9)):
        options = planned("70B", 32, link=link, **offloaded(gather_for_generation=False))
        seconds = step_seconds(options)["step 3"].seconds
        rollout = 512 * (138e9 * 3 / 4 / (0.75 * network) + 2 * 138e9 / 1.59e12 + 138e9 / 32 / 25.2e9)
        others = step_seconds(replace(options, gather_for_generation=True))["step 3"].seconds
        assert seconds["communication"] - others["communication"] == pytest.approx(rollout, rel=0.2)
    assert rollout > 5 * (others["prefill"] + others["decode"])


def test_adam_on_the_host_takes_a_third_of_13b(planned):
    """Two models of 13 billion parameters on 8 ranks, 64 updates, 30 bytes per parameter at 30.7 GB/s."""
    seconds = step_seconds(planned("13B", 8, **offloaded()))["step 3"].seconds
    assert seconds["optimiser"] == pytest.approx(64 * 2 * 13e9 / 8 * 30 / 30.7e9, rel=0.02)
    assert 190 < seconds["optimiser"] < 250


def test_epochs_and_samples_of_a_prompt_count(planned):
    """Updates grow with epochs. A prompt is read once by each rank, and shares a row with its responses."""
    options = planned("7B", 8, ppo_epochs=1)
    one, four = (step_seconds(replace(options, ppo_epochs=n))["step 3"].seconds for n in (1, 4))
    for phase, factor in (("updates", 4), ("optimiser", 4), ("decode", 1), ("scoring", 1)):
        assert four[phase] == pytest.approx(factor * one[phase], rel=0.02)
    grouped = replace(options, samples_per_prompt=16, share_prompts="no")
    assert step_seconds(grouped)["step 3"].seconds["prefill"] == pytest.approx(one["prefill"] / 2)
    shared = step_seconds(replace(grouped, share_prompts="auto", micro_batch_size=4))["step 3"].seconds
    tokens = (256 / 4 + 512) / (256 + 512)
    assert shared["updates"] / one["updates"] == pytest.approx(tokens, rel=0.1)  # and no half of a mask


def test_adapters_have_no_gradients_of_weights(planned):
    """4 operations per parameter and token instead of 6."""
    options = planned("7B", 8, gradient_checkpointing=False)
    full = step_seconds(options)["step 3"].seconds
    adapted = step_seconds(replace(options, lora_rank=16))["step 3"].seconds
    assert adapted["updates"] / full["updates"] == pytest.approx(4 / 6, rel=0.03)
    assert adapted["optimiser"] < full["optimiser"] / 50


def test_vllm_shares_weights_among_ranks(planned):
    """Four ranks decode the rows of all four, --generation_batch_size at once, and read as many prompts."""
    options = planned("13B", 8, rollout_engine="vllm", rollout_tensor_parallel=4, generation_batch_size=128)
    seconds = step_seconds(options)["step 3"].seconds
    shapes = [read_shape(options.model_name_or_path, scalar, 0, ()) for scalar in (False, True)]
    model = Decoder(Model(shapes[0], Zero(2, 8)), shapes[1].parameters - 32000 * 5120)
    hardware = table_of("a100_80gb", "hdr200", 8)
    steps = (timing.decoding_step(model, 128, n, "vllm", hardware, 4) for n in range(257, 768))
    assert seconds["decode"] == pytest.approx(2 * sum(steps), rel=1e-3)
    alone = step_seconds(replace(options, rollout_tensor_parallel=1))["step 3"].seconds
    assert seconds["prefill"] == pytest.approx(alone["prefill"])


def test_table_has_hours_and_dollars_where_records_are_known(planned):
    options = planned(
        "7B", 8, num_prompts=10_000, num_preferences=100, price_per_gpu_hour=2.0, num_train_epochs=2.0
    )
    assert step_counts(options) == {"step 1": 0, "step 2": 7, "step 3": 40}
    steps = step_seconds(options)
    lines = {line[:16].strip(): line[16:].split() for line in time_table(options, steps).splitlines()}
    hours = 40 * steps["step 3"].seconds.total() / 3600
    assert lines["hours"][0] == "-" and lines["hours"][2] == f"{hours:.1f}"
    assert lines["dollars"][0] == "-" and lines["dollars"][2] == f"{hours * 2 * 8:.0f}"
    assert lines["steps"] == ["-", "7", "40"]
    assert lines["total"][2] == f"{steps['step 3'].seconds.total():.2f}"
    rate = 512 * 768 / 8 / steps["step 3"].seconds.total()
    assert lines["tokens/s per GPU"][2] == f"{rate:.0f}"
    unknown = time_table(replace(options, num_prompts=0, num_preferences=0), steps)
    assert "hours" not in unknown and "dollars" not in unknown
    assert machine(options) == "Time on 8 x a100_80gb, estimated from data sheets:"
    assert "on 4 machines with hdr200" in machine(replace(options, num_gpus=32))


@pytest.mark.end_to_end
def test_advice_names_an_option_that_fits(planned):
    options = planned("7B", 8, offload_frozen=True, generation_batch_size=32)
    steps, predictor = step_seconds(options), cached(options)
    of_step_3 = [*advice(options, steps, 75.0, predictor)][2]
    assert of_step_3.startswith("  step 3: updates, ") and "--ppo_epochs 1: " in of_step_3
    short = replace(options, ppo_epochs=1, max_prompt_length=64, max_response_length=256)
    of_step_3 = [*advice(short, step_seconds(short), 75.0, cached(short))][2]
    assert of_step_3.startswith("  step 3: decode, ") and "--ppo_epochs" not in of_step_3
    seconds = float(of_step_3.rsplit(": ", 1)[1].removesuffix(" s"))
    assert seconds < step_seconds(short)["step 3"].seconds.total()


def test_measured_speeds_replace_those_of_the_table(tmp_path: Path):
    table = table_of("h200", "ndr400", 8)
    assert asdict(table)["network_bandwidth"] == 0.75 * 8 * 50e9 and table.matmul_flops == 0.4 * 989e12
    path = tmp_path / "speeds.json"
    path.write_text(json.dumps({"matmul_flops": 5e14, "launch_seconds": 1e-5}))
    measured = with_measured(table, str(path))
    assert measured == replace(table, matmul_flops=5e14, launch_seconds=1e-5)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"matmul": 1}', "unknown speed 'matmul'; allowed: matmul_flops"),
        ('{"matmul_flops": 0}', "matmul_flops is 0; it must be a number above 0"),
        ('{"matmul_flops": true}', "matmul_flops is True; it must be"),
        ('{"matmul_flops": NaN}', "matmul_flops is nan; it must be"),
        ("[1]", "must be an object"),
        ("{", "no JSON"),
    ],
)  # fmt: skip
def test_other_speeds_are_refused(tmp_path: Path, content: str, problem: str):
    path = tmp_path / "speeds.json"
    path.write_text(content)
    with pytest.raises(UserError, match="--measured_speeds") as error:
        with_measured(table_of("h200", "ndr400", 8), str(path))
    assert problem in str(error.value)


def test_the_page_has_the_numbers_of_the_table():
    page = (REPOSITORY / "launch/plan/README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in page.splitlines()]
    cells = {name: numbers for name, *numbers in (row for row in rows if len(row) == 5)}
    for name, field, unit in (
        ("TFLOP/s, bf16", "flops", 1e12), ("of that in training", "matmul_share", 1),
        ("TFLOP/s, fp32", "fp32_flops", 1e12), ("memory, TB/s", "bandwidth", 1e12),
        ("GPUs of a node, GB/s", "node_bandwidth", 1e9), ("host and GPU, GB/s", "host_bandwidth", 1e9),
        ("host memory of 8 GPUs, GB/s", "host_memory", 1e9),
    ):  # fmt: skip
        expected = [pytest.approx(getattr(gpu, field) / unit, rel=0.005) for gpu in GPUS.values()]
        assert [float(number) for number in cells[name]] == expected, name
    for link, (per_gpu, per_node) in LINKS.items():
        assert f"| `--link {link}` | {(8 * per_gpu + per_node) / 1e9:g} |" in page
