"""Packing: bin packing, equality with unpacked training, and refused models."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, PreTrainedModel

import step1_sft.main
from common.data.batching import with_dummies
from common.model.forward import label_pass
from common.model.head import Targets
from common.runtime.distributed import rank
from common.runtime.options import UserError
from step1_sft.data import Demonstration, collate
from step1_sft.loss import sft_loss
from step1_sft.packing import best_fit, check_packing, deal_packed, spread
from tests.conftest import assert_close
from tests.end_to_end.test_families import COMPLETE
from tests.ranks import run_stage, succeed
from tests.stages import (
    LORA,
    ZERO,
    metrics,
    sft,
)
from tests.word_encoder import EOS, PAD

MIXED = ("opt", "falcon", "bloom", "qwen3_next")  # attend across packed examples
# In the last one the rounds are not full, as in evaluation.
SIZES = [(32, 4, 1, 64), (32, 4, 8, 64), (32, 1, 2, 200), (24, 3, 2, 1000), (5, 2, 3, 64)]


@pytest.mark.parametrize("batch, micro, ranks, max_length", SIZES)
def test_every_example_is_dealt_once_within_the_limits(batch, micro, ranks, max_length):
    lengths = np.random.default_rng(0).integers(3, 65, batch)
    dealt = [deal_packed(range(batch), lengths, micro, max_length, rank, ranks) for rank in range(ranks)]
    micro_batches = list(itertools.chain(*dealt))
    assert sorted(i for rows in micro_batches for row in rows for i in row) == list(range(batch))
    assert len({len(rank_batches) for rank_batches in dealt}) == 1
    assert max(len(rows) for rows in micro_batches) <= micro
    assert max(sum(lengths[i] for i in row) for rows in micro_batches for row in rows) <= max_length
    if batch % (micro * ranks) == 0:
        assert len(dealt[0]) <= batch // (micro * ranks) and all(micro_batches)


def test_rows_of_a_known_batch():
    lengths = [5, 2, 7, 3, 3, 4]
    assert [[lengths[i] for i in row] for row in best_fit(range(6), lengths, 8)] == [[7], [5, 3], [4, 3], [2]]
    assert [[lengths[i] for i in row] for row in spread(range(6), lengths, 3)] == [[7, 2], [5, 3], [4, 3]]
    # One round is enough. Best fit makes rows of 19 and 5 tokens, but two of 12 need no padding.
    assert deal_packed(range(6), lengths, 4, 20, 0, 1) == [[[2, 3, 1], [0, 5, 4]]]


def test_collate_restarts_positions_with_each_document_and_at_padding():
    first, second = Demonstration([10, 11, EOS], [False, True, True]), Demonstration([20, EOS], [False, True])
    batch = collate([[first, second], [second]], PAD)
    assert batch.input_ids.tolist() == [[10, 11, EOS, 20, EOS], [20, EOS, PAD, PAD, PAD]]
    assert batch.positions.int().tolist() == [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [11, EOS, EOS, EOS]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert collate([[first], [second]], PAD).position_ids is None


# --- models -------------------------------------------------------------------------------------------------


def tiny(config) -> PreTrainedModel:
    config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id = 60, 0, 1, 2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()  # eval: some of the configurations have dropout


@pytest.fixture(params=[name for name in COMPLETE if name not in (*MIXED, "gemma3")])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(COMPLETE[request.param])


def documents() -> Iterator[Demonstration]:
    generator = torch.Generator().manual_seed(1)
    for length in (11, 9, 14, 5, 8):
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        yield Demonstration(ids, [False, False] + [True] * (length - 2))


def loss_and_gradients(model: PreTrainedModel, rows: list[list[Demonstration]]) -> list[torch.Tensor]:
    model.zero_grad()
    batch = collate(rows, PAD)
    targets = Targets(batch.labels)
    logprobs = label_pass(model, batch.input_ids, batch.positions, targets, batch.position_ids).logprobs
    loss = sft_loss(logprobs, len(batch.labels))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_packed_loss_and_gradients_match_unpacked_ones(model):
    a, b, c, d, e = documents()
    expected = loss_and_gradients(model, [[a], [b], [c], [d], [e]])
    packed = loss_and_gradients(model, [[a, b], [c, d, e]])  # the first row ends in padding
    for one, other in zip(packed, expected, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_document_attends_to_another(model):
    a, b, c, _, _ = documents()
    other = a._replace(ids=[3 + (i + 20) % 57 for i in a.ids])

    def logits(first: Demonstration) -> torch.Tensor:
        batch = collate([[first, b], [c]], PAD)
        return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits

    original, changed = logits(a), logits(other)
    own = slice(a.length, a.length + b.length)
    assert torch.equal(original[0, own], changed[0, own])
    assert not torch.allclose(original[0, : a.length], changed[0, : a.length])


def test_models_that_can_pack_are_accepted(model):
    check_packing(model, max_length=64)
    check_packing(model.bfloat16(), max_length=8)


@pytest.mark.parametrize(("length", "unpads", "lines"), [(2048, False, 0), (4096, False, 1), (4096, True, 0)])
def test_long_packed_rows_name_faster_kernels(model, monkeypatch, capsys, length, unpads, lines):
    """Unless their kernels take lengths, which --attn_implementation varlen gives to models with `sdpa`."""
    monkeypatch.setattr("step1_sft.packing.can_unpad", lambda *_: unpads)
    monkeypatch.setattr("step1_sft.packing.on_cpu", lambda: False)
    check_packing(model, length)
    assert capsys.readouterr().out.count("--attn_implementation flash_attention_2 needs none\n") == lines


@pytest.mark.parametrize("config", [COMPLETE[name] for name in MIXED], ids=MIXED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_attend_across_documents_are_refused(config, dtype):
    with pytest.raises(UserError, match=f"--packing: a model of type {config.model_type} "):
        check_packing(tiny(config).to(dtype), max_length=64)


# --- the stage ----------------------------------------------------------------------------------------------

NAMES = ("train/loss", "train/grad_norm", "eval/loss")
PACKED = ["--packing", "--max_length", "96", "--micro_batch_size", "2"]


@pytest.fixture(scope="module")
def unpacked(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    succeed("step1_sft.main", [*sft(world, folder / "sft"), "--max_length", "96"], folder)
    return folder / "sft"


@pytest.mark.parametrize("ranks, zero", [(1, "zero0"), (2, "zero2"), (2, "zero3")])
def test_a_packed_run_matches_the_unpacked_run(
    world: Path, unpacked: Path, tmp_path: Path, ranks: int, zero: str
) -> None:
    options = [*sft(world, tmp_path / "sft"), *PACKED, "--zero_config", str(ZERO / f"{zero}.json")]
    succeed("step1_sft.main", options, tmp_path, ranks)
    for name in NAMES:
        expected = metrics(unpacked, name)
        assert metrics(tmp_path / "sft", name) == pytest.approx(expected, rel=1e-4, abs=2e-6), name


def test_a_rank_without_rows_runs_a_dummy_forward_pass(
    world: Path, unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def first_rank_alone(lengths, options):
        rows = deal_packed(range(len(lengths)), lengths, options.micro_batch_size, options.max_length, 0, 1)
        return with_dummies(rows if rank() == 0 else [[] for _ in rows], dummy=[[0]])

    monkeypatch.setattr(step1_sft.main, "micro_batches", first_rank_alone)
    options = [*sft(world, tmp_path / "sft"), *PACKED, "--zero_config", str(ZERO / "zero3.json")]
    succeed("step1_sft.main", options, tmp_path, ranks=2)
    for name in NAMES:
        expected = metrics(unpacked, name)
        assert metrics(tmp_path / "sft", name) == pytest.approx(expected, rel=1e-4, abs=2e-6), name


def test_packing_with_lora_and_gradient_checkpointing(world: Path, tmp_path: Path) -> None:
    for name, options in (("plain", []), ("packed", [*PACKED, "--gradient_checkpointing"])):
        words = [*sft(world, tmp_path / name), "--max_length", "96", *LORA, *options]
        succeed("step1_sft.main", words, tmp_path)
    for name in NAMES:
        expected = metrics(tmp_path / "plain", name)
        assert metrics(tmp_path / "packed", name) == pytest.approx(expected, rel=1e-4, abs=2e-6), name


def test_padding_share_is_measured(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count tokens, with and without padding, where micro-batches are made."""

    def counting(rows, pad):
        batch = collate(rows, pad)
        tokens = sum(part.length for row in rows for part in row)
        with (tmp_path / "counts.jsonl").open("a") as file:
            file.write(f"[{tokens}, {batch.input_ids.numel()}]\n")
        return batch

    monkeypatch.setattr(step1_sft.main, "collate", counting)
    words = [*sft(world, tmp_path / "sft", steps=1), *PACKED, "--global_batch_size", "24"]
    succeed("step1_sft.main", words, tmp_path, ranks=2)
    counts = [json.loads(line) for line in (tmp_path / "counts.jsonl").read_text().splitlines()]
    tokens, all_tokens = map(sum, zip(*counts, strict=True))
    assert len(counts) < 24 / 2
    share = metrics(tmp_path / "sft", "train/padding_share")
    assert share == pytest.approx([1 - tokens / all_tokens], rel=1e-6)


def test_step_1_refuses_opt_in_one_line(world: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [*sft(world, tmp_path / "out"), *PACKED, "--zero_config", str(ZERO / "zero3.json")]
    words += ["--model_name_or_path", str(tmp_path / "model")]
    result = run_stage("step1_sft.main", words, tmp_path, ranks=2)
    assert result.codes == [2, 2], result.output
    assert "error: --packing: a model of type opt " in result.output and "Traceback" not in result.output
