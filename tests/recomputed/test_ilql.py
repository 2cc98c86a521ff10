"""ILQL against plain PyTorch: training, the heads' file, and decoding."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from common.generation.decoding import sample_responses, uniforms_for
from common.generation.generate import load_policy
from common.model.forward import base_model, token_logprobs
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from tests.conftest import assert_close
from tests.ranks import succeed
from tests.recomputed.passes import check_budget, passes, recorded
from tests.recomputed.plain import merged
from tests.recomputed.plain_ilql import Scored, WithHeads, guided_logprobs, train
from tests.recomputed.tiny import (
    EOS,
    compare_adapted,
    compare_metrics,
    compare_weights,
    ids_of,
    words,
    write_records,
)

RECORDS = [
    {"prompt": "abc", "response": "de f gggg", "score": 1.5},
    {"prompt": "b ", "completion": "aaaaaab", "score": -1},
    {"prompt": "hhhhhhhhhh", "response": "ij ha ha", "score": 0.25},
    {"prompt": "ad a ", "response": "bad bed", "score": 2, "ended": False},
    {"prompt": "fab", "response": "h", "score": -3.5},
    {"prompt": "cab ", "response": "ice c ababab", "score": "0.75"},
    {"prompt": "c", "response": "jade gig did", "score": 0},
    {"prompt": "a big badge ", "response": "cage", "score": 1},
]
HELD_OUT = [
    {"prompt": "abba", "response": "dad did", "score": -2},
    {"prompt": "egg", "response": "fed a high bid", "score": 1},
    {"prompt": "if", "response": "ijij", "score": 0.5},
]
OPTIONS = {
    "max_steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.02,
    "lr_scheduler_type": "linear", "warmup_ratio": 0, "weight_decay": 0.2, "adam_epsilon": 0.01,
    "max_grad_norm": 0.5, "seed": 3, "lora_rank": 0, "lora_alpha": 6, "logging_steps": 1, "eval_steps": 0,
    "save_steps": 0, "tau": 0.8, "gamma": 0.9, "cql_scale": 0.3, "awac_scale": 0.7, "beta": 0.4,
    "alpha": 0.25, "steps_for_target_q_sync": 2, "standardise_scores": True, "ilql_beta": 1.5,
}  # fmt: skip
PARTS = {"up": "0", "down": "2"}


def tokens(record: dict) -> Scored:
    prompt, response = ids_of(record["prompt"]), ids_of(record.get("response") or record["completion"])
    ids = [*prompt, *response, *([EOS] * record.get("ended", True))]
    return Scored(ids, [*range(len(prompt), len(ids))], float(record["score"]))


@pytest.mark.parametrize(
    ("ranks", "budget", "change"),
    [
        (1, 0, {}),
        (2, 60, {}),
        (1, 0, {"beta": 0.0, "standardise_scores": False, "steps_for_target_q_sync": 1}),
    ],
)
def test_ilql(tiny: Path, tmp_path: Path, ranks: int, budget: int, change: dict) -> None:
    """In micro-batches of records, and of up to 60 tokens."""
    model = compare(tiny, tmp_path, ranks, {**OPTIONS, **change}, budget)
    compare_weights(tmp_path / "out/final", model.model)
    if budget:
        of_ranks = [[one for one in passes(tmp_path, rank) if one.has_gradient] for rank in range(ranks)]
        check_budget(of_ranks, budget)


def test_adapted_ilql(tiny: Path, tmp_path: Path) -> None:
    """With LoRA, final/ is merged, and has the heads too."""
    options = {**OPTIONS, "lora_rank": 2}
    model = compare(tiny, tmp_path, 1, options)
    compare_adapted(tmp_path / "out/final", merged(model.model, options["lora_rank"], options["lora_alpha"]))


def compare(tiny: Path, folder: Path, ranks: int, options: dict, budget: int = 0) -> WithHeads:
    """Run both, and compare all but the weights of the policy. budget: tokens of a micro-batch."""
    paths = {
        "train_data": write_records(folder / "train.jsonl", RECORDS),
        "eval_data": write_records(folder / "eval.jsonl", HELD_OUT),
        "model_name_or_path": tiny / "model", "output_dir": folder / "out",
    }  # fmt: skip
    module = "step2_reward.ilql.main"
    with recorded(folder):
        succeed(module, words({**options, **paths, "micro_batch_tokens": budget}), folder, ranks)
    model, lines = train(tiny / "model", [*map(tokens, RECORDS)], [*map(tokens, HELD_OUT)], options)
    compare_metrics(folder / "out", lines)
    compare_heads(folder / "out/final/ilql/heads.safetensors", model, options["ilql_beta"])
    compare_decoding(folder / "out/final", model, options["ilql_beta"])
    return model


def compare_heads(file: Path, model: WithHeads, beta: float) -> None:
    heads = {"q.0": model.q[0], "q.1": model.q[1], "v": model.v}
    heads |= {f"target.{number}": head for number, head in enumerate(model.target)}
    expected = {
        f"{name}.{part}.{kind}": head.state_dict()[f"{index}.{kind}"]
        for name, head in heads.items()
        for part, index in PARTS.items()
        for kind in ("weight", "bias")
    }
    assert_close(load_file(file), expected)
    with safe_open(file, "pt") as content:
        assert float(content.metadata()["ilql_beta"]) == beta


@torch.no_grad()
def compare_decoding(folder: Path, model: WithHeads, saved_beta: float) -> None:
    """Sampled responses and log-probabilities of `final/`: with the saved beta, with another one, with 0."""
    encoder = SegmentEncoder(load_tokenizer(str(folder)))
    prompts = [ids_of("ab"), ids_of("a big badge "), ids_of("c")]
    for given, beta in ((-1.0, saved_beta), (4.0, 4.0), (0.0, 0.0)):
        policy = base_model(load_policy(str(folder), encoder, {"zero_optimization": {"stage": 0}}, given))
        sampled = sample_responses(policy, prompts, uniforms_for(1, 1, [0, 1, 2], 9), 0.8, 0.9, EOS, 0, False)
        for row, prompt in enumerate(prompts):
            response = sampled.ids[row, : sampled.lengths[row]].tolist()
            ids = [*prompt, *response]
            expected = guided_logprobs(model, ids, beta)
            for number, token in enumerate(response):
                scaled = torch.log_softmax(expected[len(prompt) + number - 1] / 0.8, 0)
                nucleus = scaled.sort(descending=True)
                allowed = nucleus.indices[nucleus.values.exp().cumsum(0) - nucleus.values.exp() < 0.9]
                assert token in allowed
                among = torch.log_softmax(scaled[allowed], 0)[(allowed == token).nonzero()[0, 0]]
                assert_close(sampled.logprobs[row, number], among, rtol=1e-4, atol=1e-5)
            is_label = torch.zeros(1, len(ids), dtype=torch.bool)
            is_label[0, len(prompt) :] = True
            logprobs = token_logprobs(policy, torch.tensor([ids]), is_label).logprobs
            places = [expected[len(prompt) + n - 1, token] for n, token in enumerate(response)]
            assert_close(logprobs, torch.stack(places), rtol=1e-4, atol=1e-5)
