"""The memory planner, compared with published numbers and with autograd, and as a command."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from common.model.loading import load_config
from common.model.lora import add_adapters
from common.model.zero import CONFIG_FOLDER
from common.numeric.top_k_top_p import support
from common.runtime.option_parser import parse_options
from common.runtime.options import LoraOptions
from launch.plan import activations, logits, memory
from launch.plan.main import CARDS, USABLE, verdicts
from launch.plan.memory import Model, Parts, Shape, Zero, total
from launch.plan.options import PlanOptions
from launch.plan.phases import Phase, Sizes, step3
from launch.plan.predict import GIB, predict, read_models
from launch.plan.remedies import cached, least, remedies, ways
from launch.plan.shapes import read_shape
from step3_ppo.options import PPOOptions
from tests.conftest import REPOSITORY

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, intermediate_size=176, num_key_value_heads=2),
    "tied": LlamaConfig(**SMALL, intermediate_size=176, tie_word_embeddings=True),
    "eager": LlamaConfig(**SMALL, intermediate_size=176),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=160, num_key_value_heads=2, head_dim=32),
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=100),
    "opt": OPTConfig(**SMALL, ffn_dim=256, word_embed_proj_dim=64),
}
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
    max_position_embeddings=4096,
)  # fmt: skip
SIZES = Sizes(
    micro_batch=2, accumulates=False, checkpointing=False, actor_checkpointing=False,
    critic_checkpointing=False, length=0, prompt=8, response=16, generated=4, gathers=True,
    rollout=8, top_k=0, top_p=1.0,
)  # fmt: skip
PARAMETERS_OF_LLAMA_2_7B = 6_738_415_616  # of the published checkpoint


def written(config: PretrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanOptions:
    """Llama 2 7B on 8 GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    return PlanOptions(num_gpus=8, model_name_or_path=written(LLAMA_2_7B, tmp_path / "llama"))


def plain(parameters: int, **sizes: int) -> Shape:
    fields = dict.fromkeys(Shape.__dataclass_fields__, 0) | {"parameters": parameters, "trained": parameters}
    return Shape(**fields | sizes)


# Rajbhandari et al. 2020, figure 1: GB for 7.5 billion parameters on 64 GPUs.
@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_model_states_match_the_zero_paper(stage: int, gigabytes: float):
    model = Model(plain(7_500_000_000), Zero(stage, ranks=64))
    parts = memory.weights(model) + memory.gradients(model) + memory.optimiser(model)
    assert total(parts) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_many_micro_batches_are_summed_in_fp32(big: PlanOptions):
    """Twice the bytes of 16-bit gradients; at stage 2 the optimiser step then needs no copy of them."""
    for stage, copies in ((2, 0), (3, 4 * 500)):
        model = Model(plain(1000), Zero(stage, 2, sums_in_fp32=True))
        assert memory.gradients(model) == Parts(gradients=4 * 500) and memory.copies_in_step(model) == copies
    for size, is_summed in ((8 * 4 * 32, True), (8 * 4 * 31, False)):
        zero = read_models(replace(big, global_batch_size=size)).policy.zero
        assert zero.sums_in_fp32 == is_summed


def test_hpz_adds_a_copy_of_the_weights_per_group_of_ranks():
    assert memory.weights(Model(plain(1000), Zero(3, 40, hpz=8)))["weights"] == 2 * (1000 / 40 + 1000 / 8)
    assert memory.weights(Model(plain(1000), Zero(2, 40, hpz=8)))["weights"] == 2 * 1000


def test_offload_moves_model_states_to_the_host():
    zero = Zero(3, ranks=4, offloads_optimiser=True, offloads_weights=True)
    model = Model(plain(1000), zero)
    parts = memory.weights(model) + memory.gradients(model) + memory.optimiser(model)
    assert total(parts) == 0
    # Pinned blocks are powers of two: weights twice, gradients in fp32 and in 16 bits.
    assert parts["host"] == 512 + 512 + (8 + 4) * 1000 / 4 + 1024 + 512


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4])
def test_parameters_match_the_model(tmp_path: Path, name: str, rank: int):
    path = written(FAMILIES[name], tmp_path)
    for is_scalar, kind in enumerate((AutoModelForCausalLM, AutoModelForSequenceClassification)):
        config = load_config(path)
        config.num_labels = 1
        model = add_adapters(kind.from_config(config), LoraOptions(lora_rank=rank), seed=0)
        shape = read_shape(path, bool(is_scalar), rank, ("all-linear",))
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        assert shape.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parameters_of_a_known_model(big: PlanOptions):
    assert read_shape(big.model_name_or_path, False, 0, ()).parameters == PARAMETERS_OF_LLAMA_2_7B


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 4])
def test_activations_match_autograd(tmp_path: Path, name: str, dtype: torch.dtype, rank: int):
    """Autograd saves distinct storages, other than the model's, in a forward pass over 2 x 48 tokens."""
    path = written(FAMILIES[name], tmp_path)
    attention = "eager" if name == "eager" else "sdpa"
    model = AutoModelForCausalLM.from_config(load_config(path), dtype=dtype, attn_implementation=attention)
    model = add_adapters(model, LoraOptions(lora_rank=rank), seed=0).train()
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    backbone = (model.get_base_model() if rank else model).base_model
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        backbone(input_ids=torch.randint(100, (2, 48)), use_cache=False)
    measured = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in of_model)
    shape = read_shape(path, False, rank, ("all-linear",))
    shape = replace(shape, has_eager_attention=name == "eager")
    planned = activations.activations(Model(shape, Zero(0, 1, size=dtype.itemsize)), rows=2, width=48)
    assert planned == pytest.approx(measured, rel=0.08)


def test_checkpointing_saves_the_input_of_each_layer():
    shape = plain(1000, layers=10, hidden=8, heads=2, queries=8, keys=4, mlp=32, saved_in_mlp=4, norms=2)
    model = Model(replace(shape, has_rms_norm=True), Zero(0, 1, size=2))
    layer = 3 * 5 * ((4 + 2 * 2) * 16 + 2 * (16 + 8) + 4 * 2 + 2 * 4 * 32)
    last_norm = 3 * 5 * (4 + 2 * 2) * 8
    assert activations.activations(model, 3, 5) == 10 * layer + last_norm
    assert activations.activations(model, 3, 5, checkpointing=True) == 10 * 3 * 5 * 2 * 8 + last_norm
    assert activations.in_layer(model, 3, 5) == layer


def test_kv_cache_matches_the_model(tmp_path: Path, big: PlanOptions):
    path = written(FAMILIES["qwen3"], tmp_path / "qwen")
    cache = AutoModelForCausalLM.from_config(load_config(path))(torch.ones(2, 9).long(), use_cache=True)
    size = sum(t.nbytes for layer in cache.past_key_values.layers for t in (layer.keys, layer.values))
    model = Model(read_shape(path, False, 0, ()), Zero(0, 1, size=4))
    assert activations.kv_cache(model, 2, 9) == size * 13 / 12  # and the keys of half the rows in one layer
    llama = Model(read_shape(big.model_name_or_path, False, 0, ()), Zero(2, 8))
    assert activations.kv_cache(llama, 1, 1) == 2**19 * 129 / 128  # half a MiB per token


def test_buffers_by_hand():
    """Two buckets and a flat copy of one; a bucket and the largest gradient at stage 3; a copy at stage 0."""
    shape = plain(1000, largest=300)
    for zero, elements in {
        Zero(0, 1, bucket=400): 0,
        Zero(0, 2, bucket=400): 400,
        Zero(2, 2, bucket=400, buffers=2): 400 * 3,
        Zero(2, 2, bucket=4000): 4000 + 1000 / 2,  # the gradients of the only bucket replace the copy
        Zero(2, 2, bucket=4000, on_cpu=True): 1000 + 1000 / 2,
        Zero(3, 2, bucket=100): 100 + 300,
    }.items():
        assert memory.buffers_of_reduction(Model(shape, zero)) == 2 * elements
    assert memory.copies_in_step(Model(shape, Zero(2, 2))) == (2 + 4) * 1000 / 2
    assert memory.copies_in_step(Model(shape, Zero(3, 2))) == (2 + 4) * 1000 / 2
    # Stage 3 updates sub-groups, which end with the tensor that fills them.
    assert memory.copies_in_step(Model(shape, Zero(3, 2, sub_group=100))) == (2 + 4) * (100 + 300 / 2)
    assert memory.copies_in_step(Model(shape, Zero(2, 2, sub_group=100))) == (2 + 4) * 1000 / 2
    assert memory.gathered(Model(shape, Zero(3, 2, live=600))) == 2 * 600
    assert memory.gathered(Model(shape, Zero(3, 1))) == memory.gathered(Model(shape, Zero(2, 2))) == 0


def test_logits_by_hand():
    model = Model(plain(1, vocabulary=32_000), Zero(2, 1, size=2))
    assert logits.logits(model, 100) == 100 * 32_000 * 4
    assert logits.gradient_of_logits(model, 100) == 100 * 32_000 * 4 * 4
    assert logits.logits_in_scoring(model, 100) == 100 * 32_000 * (4 + 4 + 4)
    assert logits.logits_in_scoring(Model(model.shape, Zero(0, 1, size=4)), 100) == 100 * 32_000 * (4 + 4)


@pytest.mark.parametrize("hidden", [10, 1000])
def test_logits_of_one_chunk_by_hand(monkeypatch: pytest.MonkeyPatch, hidden: int):
    """Chunks of 7 tokens, and the gradient of a trained head."""
    monkeypatch.setattr(logits, "CHUNK", 7 * 3000)
    adapted = plain(9, trained=1, vocabulary=3000, hidden=hidden)
    model = Model(replace(adapted, trained=9), Zero(2, 1, size=2))
    assert logits.logits(model, 7) == 7 * 3000 * 4 and logits.logits(model, 8) == 0
    assert logits.gradient_of_logits(model, 100) == 3000 * hidden * 2 + 7 * 3000 * 20
    assert logits.gradient_of_logits(model._replace(shape=adapted), 100) == 7 * 3000 * 20
    assert logits.logits_in_scoring(model, 100) == 7 * 3000 * (4 + 4 + 4)


def test_step_3_has_four_copies_of_weights_and_two_with_adapters(big: PlanOptions):
    one = 2 * PARAMETERS_OF_LLAMA_2_7B / GIB
    for options, copies in (
        (big, 4),
        (replace(big, lora_rank=8), 2),
        (replace(big, offload_frozen=True), 2),
        (replace(big, advantage_estimator="rloo"), 3),  # no critic
    ):
        weights = predict(options)["step 3"].parts["weights"]
        assert weights / GIB == pytest.approx(copies * one, rel=0.02)


def test_vllm_has_its_own_weights_and_cache_during_a_rollout(big: PlanOptions):
    """On a GPU; on a CPU it has them all the time."""
    actor = Model(read_shape(big.model_name_or_path, False, 0, ()), Zero(3, 8))
    phases = {
        (device, ranks): [
            *step3(model, None, model, [], replace(SIZES, engine_ranks=ranks, engine_cache=7000), Parts())
        ]
        for device, model in (("gpu", actor), ("cpu", actor._replace(zero=Zero(3, 8, on_cpu=True))))
        for ranks in (0, 2)
    }
    copy = 2 * PARAMETERS_OF_LLAMA_2_7B
    rollout, plain = phases["gpu", 2][0].parts, phases["gpu", 0][0].parts
    assert rollout["weights"] - plain["weights"] == copy / 2
    assert rollout["KV cache"] == 7000 and not rollout["buffers"]
    assert phases["gpu", 2][1:] == phases["gpu", 0][1:]
    for one, other in zip(phases["cpu", 2], phases["cpu", 0], strict=True):
        assert one.parts["weights"] - other.parts["weights"] == copy / 2, one.name


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_models_are_on_the_gpu_one_at_a_time(stage: int):
    trained = Model(plain(1000), Zero(stage, 4))
    frozen = Model(plain(1000, trained=0), Zero(stage, 4, offloads_weights=True))
    phases = [*step3(trained, trained, frozen, [frozen], SIZES, Parts())]
    two, host = (2 * 2 * 1000 / 4, 2 * 512) if stage == 3 else (2 * 2 * 1000, 2 * 2 * 1000)
    assert {(phase.parts["weights"], phase.parts["host"]) for phase in phases} == {(two, host)}
    reference, _, reward, _ = [phase.parts for phase in phases if phase.name == "scoring"]
    assert reference["buffers"] == reward["buffers"] == 2 * 1000


def test_updates_of_step_3_by_hand():
    """With accumulation there are gradients of both models; activations are of one at a time."""
    widths = {"layers": 2, "hidden": 5, "mlp": 10, "saved_in_mlp": 4}
    actor, critic = (
        Model(plain(size, largest=largest, **widths), Zero(0, 1, size=4))
        for size, largest in ((1000, 800), (700, 400))
    )
    layer, inputs, last_norm = 48 * 4 * 4 * 10, 48 * 4 * 5, 48 * 8 * 5
    full, checkpointed, temporary = 2 * layer + last_norm, 2 * inputs + last_norm, 48 * 4 * (3 * 10 + 5)
    for sizes, other, recomputed in (
        (SIZES, full, 0),
        (replace(SIZES, critic_checkpointing=True), checkpointed, layer),
    ):
        phases = [*step3(actor, critic, None, [], replace(sizes, accumulates=True), Parts())]

        def sizes_at(*names: str, phases: list[Phase] = phases) -> list[tuple[float, float]]:
            parts = [phase.parts for phase in phases if phase.name in names]
            return [(one["gradients"], one["activations"]) for one in parts]

        assert sizes_at("backward begins") == [(6800, full), (6800, other)]
        at_work = (6800, full + temporary), (6800, other + recomputed + temporary)
        assert sizes_at("last layer", "recomputation") == [*at_work]
        # Without those of the first layer and the largest tensor, here the embedding.
        assert sizes_at("first layer") == [
            (400 + 2800, layer + temporary),
            (300 / 2 * 4 + 4000, layer + temporary),
        ]
        assert sizes_at("backward ends") == [(6800, 0), (6800, 0)]
        single = [*step3(actor, critic, None, [], sizes, Parts())]
        assert [p.parts["gradients"] for p in single if p.name == "backward begins"] == [0, 0]


def test_a_limit_on_costs_adds_a_critic_and_maybe_a_model(big: PlanOptions):
    """The new critic has weights and states of AdamW all the time; it is updated after the others."""
    of_function = replace(big, cost_function=["f.py:f"])
    of_model = replace(big, cost_model_name_or_path=big.model_name_or_path)
    without, function, model = map(read_models, (big, of_function, of_model))
    assert without.cost_critic is None and function.cost_critic == function.critic == model.cost_critic
    counts = [len(one.scorers) for one in (without, function, model)]
    assert counts == [1, 1, 2] and len(read_models(replace(of_model, lora_rank=4)).scorers) == 0
    parts = [predict(one)["step 3"].parts for one in (big, of_function, of_model)]
    states, held = memory.optimiser(function.critic), memory.weights(function.critic)
    assert parts[1]["optimiser"] - parts[0]["optimiser"] == pytest.approx(states["optimiser"])
    assert parts[2]["weights"] - parts[0]["weights"] == pytest.approx(2 * held["weights"])
    assert not any(remedy.note.startswith("no critic") and remedy.levels for remedy in remedies(of_model))


def test_options_match_the_stages():
    for name in ("max_response_length", "generation_batch_size", "advantage_estimator", "actor_zero_config"):
        ours, theirs = PlanOptions.__dataclass_fields__[name], PPOOptions.__dataclass_fields__[name]
        assert (ours.type, ours.default) == (theirs.type, theirs.default)
        assert ours.metadata["help"] == theirs.metadata["help"]


def test_allowed_tokens_of_the_rollout_are_counted(big: PlanOptions):
    """Every rank has the lists of all responses, as in sampling. With top-p alone their length is assumed."""
    options = replace(big, rollout_batch_size=64, max_response_length=16)
    free, top_k, top_p = (
        total(predict(replace(options, **cut))["step 3"].parts)
        for cut in ({}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.9})
    )
    lists = support(torch.randn(64 * 16, 500), 20, 1.0)
    assert top_k - free == lists.ids.nbytes + lists.sizes.nbytes
    assert top_p - free == 64 * 16 * 4 * (logits.NUCLEUS + 1)


@pytest.mark.end_to_end
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 8, "advantage_estimator": "rloo"}], ids=str)
def test_pasted_options_make_a_step_fit(big: PlanOptions, monkeypatch: pytest.MonkeyPatch, changes: dict):
    """The options give the printed peak, and none of them can be left out."""
    options = replace(big, **changes)
    room, predictor = CARDS["40 GB"] * USABLE, cached(options)
    given = ["--num_gpus", "8", "--model_name_or_path", big.model_name_or_path]
    given += [word for name, value in changes.items() for word in (f"--{name}", str(value))]

    def peak(words: list[str], step: str) -> float:
        monkeypatch.setattr("sys.argv", ["plan", *given, *words])
        return total(predict(parse_options(PlanOptions))[step].parts) / GIB

    for step, phase in predict(options).items():
        if total(phase.parts) / GIB <= room:
            continue
        solutions = ways(options, step, room, predictor)
        assert solutions and len({way.options for way in solutions}) == len(solutions)
        for way in solutions[:2] + solutions[-1:]:
            words = way.options.split()
            assert peak(words, step) == pytest.approx(way.peak) and way.peak <= room
            starts = [index for index, word in enumerate(words) if word.startswith("--")]
            starts = [index for index in starts if words[index] != "--samples_per_prompt"]
            for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
                assert peak(words[:start] + words[end:], step) > room, f"{way.options}: more than needed"
            assert not any(f"--{name} " in f"{way.options} " for name in changes), "it is on already"
        notes = [bool(way.notes) for way in solutions]
        assert notes == sorted(notes), "options that change only speed and memory come first"


def test_mildest_level_is_chosen(big: PlanOptions):
    """The largest micro-batch that fits, and the largest generation batch."""
    options = replace(big, num_gpus=8, micro_batch_size=4, max_length=512)
    predictor = cached(options)
    peaks = {size: total(predictor({"micro_batch_size": size})["step 2"].parts) / GIB for size in (4, 2, 1)}
    for size in (2, 1):
        first, *_ = ways(options, "step 2", peaks[size] + 0.01, predictor)
        assert first.options == f"--micro_batch_size {size}" and first.peak == peaks[size]


def test_a_number_of_tokens_is_planned_as_the_rows_that_fill_it(big: PlanOptions):
    """512 tokens are 2 rows of 256, a pair of which is one record; at least one record is planned."""
    predictor = cached(replace(big, max_length=256, max_prompt_length=192, max_response_length=64))

    def peaks(**changes: int) -> dict[str, float]:
        return {step: total(phase.parts) for step, phase in predictor(changes).items()}

    by_tokens = peaks(micro_batch_tokens=512)
    by_rows = {size: peaks(micro_batch_size=size, generation_batch_size=2) for size in (1, 2)}
    for step, size in (("step 1", 2), ("step 2", 1), ("step 3", 2)):
        assert by_tokens[step] == by_rows[size][step]
    assert peaks(micro_batch_tokens=8)["step 2"] == by_rows[1]["step 2"]
    options = replace(big, micro_batch_tokens=4096)
    assert any(
        "--micro_batch_tokens" in way.options for way in ways(options, "step 1", 30.0, cached(options))
    )


def test_states_away_take_host_memory_in_rollouts():
    """At stage 2 on two ranks 6 of 12 bytes per weight leave; at stage 3 none, and none during updates."""
    for stage, gone in ((2, 6 * 1000), (3, 0)):
        model, away = Model(plain(1000), Zero(stage, ranks=2)), replace(SIZES, offloads_states=True)
        here, there = ([*step3(model, None, model, [], one, Parts())] for one in (SIZES, away))
        for before, after in zip(here, there, strict=True):
            moved = gone if before.name in ("rollout", "scoring") else 0
            assert total(before.parts) - total(after.parts) == moved
            assert after.parts["host"] == 3 * 2048 * (moved > 0)  # pinned: 2000 bytes each, in powers of two


def test_zero_config_of_the_actor_is_replaced(big: PlanOptions):
    options = replace(big, actor_zero_config=str(CONFIG_FOLDER / "zero1.json"))
    solutions = ways(options, "step 3", CARDS["80 GB"] * USABLE, cached(options))
    with_zero = [way.options for way in solutions if "zero" in way.options.replace("--", "")]
    assert with_zero and all("--actor_zero_config" in o and "--critic_zero_config" in o for o in with_zero)
    assert not any(" --zero_config" in f" {options}" for options in with_zero)


@pytest.mark.end_to_end
def test_step_that_never_fits_has_a_minimum(big: PlanOptions):
    (line,) = [line for line in verdicts(big, predict(big), 3.0, cached(big)) if "step 3" in line]
    assert "even with all options: the minimum is" in line and "zero3_offload.json" in line


@pytest.mark.end_to_end
def test_all_remedies_are_listed_if_no_smaller_combination_fits(big: PlanOptions):
    predictor = cached(big)
    room = least(big, "step 3", predictor).peak + 0.001
    assert not ways(big, "step 3", room, predictor)
    lines = [*verdicts(big, predict(big), room, predictor)]
    last = next(index for index, line in enumerate(lines) if "step 3 does not fit" in line)
    assert "add to launch/step3_ppo.sh" in lines[last] and len(lines) == last + 2
    assert "zero3_offload.json" in lines[-1] and "--gather_for_generation false" in lines[-1]


def test_options_of_remedies_belong_to_the_steps():
    known = set(PPOOptions.__dataclass_fields__)
    for remedy in remedies(PlanOptions()):
        assert all(level.keys() <= known for level in remedy.levels)


def run(*words: str) -> subprocess.CompletedProcess:
    command = ["bash", str(REPOSITORY / "launch/plan.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.end_to_end
def test_command_prints_a_table_and_verdicts(big: PlanOptions):
    words = ["--num_gpus", "8", "--gradient_checkpointing", "--max_length", "5000"]
    done = run("--model_name_or_path", big.model_name_or_path, *words)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("exceeds the model's context length; using 4096") == 1
    phases = predict(replace(big, gradient_checkpointing=True, max_length=4096))
    head, printed, *_ = done.stdout.split("\n\n")
    assert (
        "policy 6.74 B parameters, reward model 6.61 B; ZeRO-2, 16-bit weights, 8 GPUs; micro-batch 4" in head
    )
    assert "rows of 4096 tokens; step 3: prompts of 256 and responses of 128 tokens" in head
    cells = {line[:16].strip(): line[16:].split() for line in printed.splitlines()}
    assert cells["token lists"] == ["0.00"] * 3 and cells["CUDA and NCCL"] == ["1.50"] * 3
    assert " ".join(cells["peak phase"]) == "recomputation recomputation optimiser step"
    assert cells["total"] == [f"{total(phase.parts) / GIB:.2f}" for phase in phases.values()]
    assert cells["optimiser"][0] == f"{12 * PARAMETERS_OF_LLAMA_2_7B / 8 / GIB:.2f}"
    assert "On cards of 40 GB, 37.4 GiB of them usable:\n  step 1 fits, with" in done.stdout
    assert "add to launch/step3_ppo.sh (fastest first):\n      --" in done.stdout


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "options are required: bash launch/plan.sh --model_name_or_path"),
        (["--model_name_or_path=DIR", "--num_gpu", "2"], "did you mean --num_gpus?"),
        (["--model_name_or_path=DIR", "--num_gpus", "3"], "not a multiple of the 3 ranks"),
        (["--model_name_or_path=DIR", "--zero_config", "absent.json"], "--zero_config absent.json: No such"),
        (["--model_name_or_path=DIR"], "MixtralForCausalLM has no dense layers"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], message: str):
    sparse = MixtralConfig(**SMALL, intermediate_size=128, num_key_value_heads=2)
    done = run(*(word.replace("DIR", written(sparse, tmp_path)) for word in words))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
