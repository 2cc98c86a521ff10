"""Phases of the plan by hand: evaluation, packed rows, shared prompts, compiled sampling, metrics."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.generation.compiled import cache_size
from common.model.loading import load_config
from common.model.shared_prompt import prompt_mask
from common.model.zero import CONFIG_FOLDER
from launch.plan import activations
from launch.plan.logits import logits_in_sampling
from launch.plan.main import by_phase
from launch.plan.memory import Model, Parts, Zero, total
from launch.plan.options import PlanOptions
from launch.plan.phases import Phase, Sizes, step1, step3
from launch.plan.predict import GIB, predict, predict_phases
from launch.plan.remedies import cached, remedies, ways
from launch.plan.sampling import SampleBatch, sampling
from launch.plan.shapes import read_shape
from tests.launch.test_plan import FAMILIES, LLAMA_2_7B, SIZES, plain, written

ZERO_3 = str(CONFIG_FOLDER / "zero3.json")
WIDTHS = {"layers": 2, "hidden": 5, "heads": 2, "queries": 8, "keys": 4, "mlp": 10, "saved_in_mlp": 4}


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanOptions:
    """Llama 2 7B on 8 GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    return PlanOptions(num_gpus=8, model_name_or_path=written(LLAMA_2_7B, tmp_path / "llama"))


def test_evaluation_of_step_1_samples_beside_the_optimiser() -> None:
    """Stage 3 gathers all weights for it, unless --gather_for_generation is off."""
    model = Model(plain(1000, **WIDTHS, largest=100, vocabulary=30), Zero(3, 4))
    sizes = replace(SIZES, length=20, samples=3, sample_length=6)

    def last(sizes: Sizes) -> Phase:
        return [*step1(model, sizes, Parts())][-1]

    name, parts = last(sizes)
    assert (name, parts["optimiser"], parts["gradients"]) == ("evaluation", 12 * 250, 2 * 250)
    assert parts["buffers"] == 2 * 1000
    assert parts["KV cache"] == (2 * 2 + 1 / 2) * 3 * (20 + 6 - 1) * 4 * 2
    assert parts["logits"] == 3 * 30 * (2 + 4 * 4)
    assert last(replace(sizes, gathers=False)).parts["buffers"] == 2 * 1000  # all that may be live
    assert last(replace(sizes, samples=0)).name != "evaluation"


def test_samples_of_an_evaluation_are_divided_among_the_ranks(big: PlanOptions) -> None:
    for samples, rows in ((8, 1), (9, 2)):
        options = replace(big, num_samples=samples, sample_length=65, compile_generation="no")
        evaluation = predict_phases(options)["step 1"][-1].parts
        assert evaluation["logits"] == logits_in_sampling(
            Model(plain(1, vocabulary=32_000), Zero(2, 8)), rows
        )


def test_compiled_sampling_has_room_to_spare() -> None:
    """5 rows of 300 columns become 8 of 384; not with partitioned weights, which cannot be compiled."""
    model = Model(plain(1000, **WIDTHS, largest=10), Zero(2, 4))
    batch = SampleBatch(5, 5, 200, 101, compiles=True)
    assert cache_size(5, 300) == (8, 384)
    assert sampling(model, batch)["KV cache"] == activations.kv_cache(model, 8, 384)
    partitioned = model._replace(zero=Zero(3, 4))
    assert sampling(partitioned, batch)["KV cache"] == activations.kv_cache(model, 8, 384)
    assert sampling(partitioned, batch._replace(gathers=False))["KV cache"] == activations.kv_cache(
        model, 5, 300
    )


def test_a_prompt_with_several_responses_is_read_once() -> None:
    model = Model(plain(1000, **WIDTHS), Zero(2, 4))
    (rollout, *_), (alone, *_) = (
        [*step3(model, None, model, [], replace(SIZES, group=group), Parts())] for group in (4, 1)
    )
    assert rollout.parts["activations"] == activations.passing(model, 1, SIZES.prompt)
    assert alone.parts["activations"] == activations.passing(model, SIZES.generated, SIZES.prompt)


def test_masks_of_packed_rows_by_hand() -> None:
    """A byte for each pair of tokens; in each layer the same in 16 bits, and keys and values of all heads."""
    model = Model(plain(1000, **WIDTHS, vocabulary=3), Zero(0, 1, size=2))
    free, packed = (activations.activations(model, 3, 7, mask=mask) for mask in ("none", "packed"))
    assert packed - free == 3 * 7 * 7 + 2 * (3 * 7 * 7 * 2 + 3 * 7 * 2 * (8 - 4) * 2)
    sizes = replace(SIZES, length=7, micro_batch=3)
    for checkpointing in (False, True):
        ways_to_pack = (replace(sizes, packs=packs, checkpointing=checkpointing) for packs in (False, True))
        peaks = [max(total(phase.parts) for phase in step1(model, one, Parts())) for one in ways_to_pack]
        layers = 1 if checkpointing else 2
        assert peaks[1] - peaks[0] == 3 * 7 * 7 + layers * (3 * 7 * 7 * 2 + 3 * 7 * 2 * (8 - 4) * 2)


def test_packing_needs_no_mask_with_flash_attention(big: PlanOptions) -> None:
    plain, packed, flash = (
        total(predict(replace(big, **options, max_length=4096))["step 1"].parts)
        for options in (
            {},
            {"packing": True},
            {"packing": True, "attn_implementation": "flash_attention_2"},
        )
    )
    assert packed > plain == flash


def test_shared_prompts_by_hand() -> None:
    """4 responses of 16 tokens on 2 rows with their prompts of 8, and a mask in the type of the weights."""
    model = Model(plain(1000, **WIDTHS, vocabulary=3), Zero(2, 2))
    sizes = replace(SIZES, micro_batch=4, generated=4, sharing=2)
    phases = [*step3(model, None, model, [], sizes, Parts())]
    layers, head, *_ = [phase.parts for phase in phases if phase.name == "scoring"]
    segments = torch.zeros(2, 8 + 2 * 16, dtype=torch.long)
    mask = prompt_mask(segments, torch.bfloat16).nbytes
    assert layers["activations"] == activations.passing(model, 2, 40) + mask and not layers["logits"]
    assert head["activations"] == 2 * 40 * 5 * 2 and head["logits"] == 4 * 16 * 3 * (4 + 4 + 4)
    begins = next(phase.parts for phase in phases if phase.name == "backward begins")
    assert begins["activations"] == activations.activations(model, 2, 40) + mask + 2 * 2 * 40 * 2 * 2 * (
        8 - 4
    )


def test_responses_share_prompts_where_that_is_less_work(big: PlanOptions) -> None:
    """Never more than a micro-batch holds, and only if --share_prompts allows it."""
    options = replace(big, max_prompt_length=1024, max_response_length=16, advantage_estimator="group")
    for changes, is_shared in (
        ({"samples_per_prompt": 4}, True),
        ({"samples_per_prompt": 4, "share_prompts": "no"}, False),
        ({"samples_per_prompt": 1}, False),
        ({"samples_per_prompt": 4, "max_prompt_length": 8, "max_response_length": 2048}, False),
    ):
        changed = replace(options, **changes)
        separate = predict_phases(replace(changed, share_prompts="no"))["step 3"]
        assert (predict_phases(changed)["step 3"] != separate) == is_shared


def test_eager_attention_is_counted_where_it_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    options = PlanOptions(model_name_or_path=written(FAMILIES["llama"], tmp_path), max_length=512)

    def saved(kernels: str) -> float:
        backward, *_ = predict_phases(replace(options, attn_implementation=kernels))["step 1"]
        return backward.parts["activations"]

    assert saved("eager") - saved("sdpa") >= 4 * 512**2 * 4 * (4 + 2) * 3


def test_eager_attention_repeats_keys_and_values(tmp_path: Path) -> None:
    """Autograd saves them for all heads."""
    config = load_config(written(FAMILIES["llama"], tmp_path))  # 4 heads, 2 of keys and values
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        return saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model.base_model(input_ids=torch.randint(100, (2, 48)), use_cache=False)
    measured = sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in of_model)
    shape = read_shape(str(tmp_path), False, 0, (), "eager")
    planned = activations.activations(Model(shape, Zero(0, 1, size=4)), rows=2, width=48)
    assert planned == pytest.approx(measured, rel=0.08)


def test_a_gold_model_is_in_host_memory(big: PlanOptions) -> None:
    before, after = (
        predict(one)["step 3"].parts for one in (big, replace(big, gold_reward_model=big.model_name_or_path))
    )
    gold = 2 * read_shape(big.model_name_or_path, True, 0, ()).parameters
    assert after["host"] - before["host"] == gold and after["weights"] == before["weights"]


def test_a_process_model_is_one_more_frozen_model(big: PlanOptions) -> None:
    """Beside the reward model, and in its place; with adapters the critic is the reward model still."""
    path, parameters = big.model_name_or_path, read_shape(big.model_name_or_path, True, 0, ()).parameters
    for one in (replace(big, reward_model_name_or_path=[path]), replace(big, lora_rank=8)):
        given = replace(one, reward_model_name_or_path=[path])
        before, after = (
            predict(options)["step 3"].parts["weights"]
            for options in (given, replace(given, process_model_name_or_path=path))
        )
        assert after - before == 2 * parameters
    alone = replace(big, process_model_name_or_path=path)
    assert predict(alone)["step 3"].parts["weights"] == predict(big)["step 3"].parts["weights"]


def test_demonstrations_leave_gradients_before_the_first_micro_batch(big: PlanOptions) -> None:
    """PPO-ptx accumulates, as more than one micro-batch does."""
    single, mixed = (
        predict_phases(replace(big, global_batch_size=32, micro_batch_size=4, ptx_data=data))["step 3"]
        for data in ([], ["F.jsonl"])
    )
    starts = [
        [phase.parts["gradients"] for phase in phases if phase.name == "backward begins"]
        for phases in (single, mixed)
    ]
    assert not any(starts[0]) and any(starts[1])


def test_libraries_take_more_with_more_ranks(big: PlanOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks, gibibytes in ((1, 1.0), (8, 1.5), (16, 2.0)):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        options = replace(big, num_gpus=ranks)
        assert predict(options)["step 1"].parts["fixed"] == gibibytes * GIB


def test_step_3_by_phase() -> None:
    """The peak of tensors in each phase of the metrics."""
    phases = [
        Phase("rollout", Parts(fixed=GIB, weights=3 * GIB)),
        Phase("scoring", Parts(fixed=GIB, weights=3 * GIB, logits=GIB)),
        Phase("scoring", Parts(fixed=GIB, weights=3 * GIB)),
        Phase("backward begins", Parts(fixed=GIB, weights=5 * GIB, host=9 * GIB)),
        Phase("optimiser step", Parts(fixed=GIB, weights=4 * GIB)),
    ]
    assert by_phase(phases).endswith(": rollout 3.00, score 4.00, train 5.00")


@pytest.mark.parametrize(
    ("given", "step", "remedy", "words"),
    [
        ({"offload_frozen": True}, "step 3", {"offload_states": True}, "--offload_states"),
        (
            {"zero_config": ZERO_3, "micro_batch_size": 1},
            "step 1",
            {"gather_for_generation": False},
            "--gather_for_generation false",
        ),
        (
            {
                "offload_frozen": True,
                "offload_states": True,
                "micro_batch_size": 16,
                "max_response_length": 512,
                "actor_gradient_checkpointing": True,
            },
            "step 3",
            {"critic_gradient_checkpointing": True},
            "--critic_gradient_checkpointing",
        ),
    ],
)
def test_options_are_listed_that_just_suffice(
    big: PlanOptions, given: dict, step: str, remedy: dict, words: str
) -> None:
    options = replace(big, **given)
    before, after = (total(predict(one)[step].parts) / GIB for one in (options, replace(options, **remedy)))
    assert after < before
    assert words in [way.options for way in ways(options, step, after, cached(options))]


def test_vllm_is_a_way_where_it_can_sample() -> None:
    """With its weights on 1, 2 or 4 of a machine's ranks; not with top-k, which it does not support here."""
    options = PlanOptions(num_gpus=16, gpus_per_node=4)
    (of_vllm,) = [remedy for remedy in remedies(options) if remedy.note == "needs vLLM"]
    assert [level.get("rollout_tensor_parallel", 1) for level in of_vllm.levels] == [1, 2, 4]
    assert not next(one for one in remedies(replace(options, top_k=5)) if one.note == "needs vLLM").levels
