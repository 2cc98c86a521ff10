"""Load-balancing loss of mixtures of experts, against transformers."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from common.model import families
from common.model.forward import label_pass
from common.model.head import Targets
from common.model.load_balancing import has_balance_loss
from step1_sft.loss import sft_loss
from step2_reward.direct.data import Choice
from step2_reward.direct.objective import global_totals, micro_batch_loss
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.reference import Example
from tests.conftest import assert_close

SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
    "output_router_logits": True, "router_aux_loss_coef": 0.5,
}  # fmt: skip
MIXTURES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **SHAPE, head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    ),
}  # fmt: skip
LENGTHS = [9, 5]
IDS = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]  # (2, 9)
LOSS_MASK = MASK & (torch.arange(9) >= 3)


def build(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_loss_and_gradients_match_transformers(name, checkpointing):
    """With padding: transformers uses an attention mask, Triptych passes none."""
    model, ids = build(MIXTURES[name]), IDS.masked_fill(~MASK, 0)
    labels = ids.masked_fill(~LOSS_MASK, -100)
    expected = model(input_ids=ids, attention_mask=MASK.long(), labels=labels)
    assert expected.aux_loss > 1
    expected.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logprobs, _, balance = label_pass(model, ids, LOSS_MASK.roll(-1, dims=1), Targets(ids[LOSS_MASK]))
    assert_close(balance, 0.5 * expected.aux_loss * sum(LENGTHS))
    loss = sft_loss(logprobs, int(LOSS_MASK.sum())) + balance / sum(LENGTHS)
    assert_close(loss, expected.loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name])


def test_direct_optimisation_adds_it_only_in_training():
    model = build(MIXTURES["mixtral"])
    row = Choice([*IDS[0].tolist(), *IDS[1, :5].tolist()], LENGTHS, [3, 3], [0.0, 1.0])
    options = DirectOptions(loss="dpo")
    options.check()
    example = Example(row, [-3.0, -1.0], None, 0.0)
    losses = {}
    for training in (True, False):
        loss, figures = micro_batch_loss(
            model.train(training), [example], global_totals([example], options), 0.0, options
        )
        losses[training] = loss
        assert ("aux_loss" in figures) is training
        if training:
            balance = figures["aux_loss"]
    assert_close(losses[True] - losses[False], balance)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=8, vocab_size=9),
        MixtralConfig(**SHAPE | {"output_router_logits": False}),
    ],
)
def test_models_without_the_loss_return_zero(config):
    model = build(config)
    assert not has_balance_loss(model)
    ids = torch.tensor([[1, 2, 3]])
    assert label_pass(model, ids, ids == 2, Targets(ids[ids == 3])).balance == 0


def test_router_jitter_and_dropout_are_turned_off():
    config = MixtralConfig(**SHAPE, router_jitter_noise=0.3, attention_dropout=0.1)
    families.remove_noise(config)
    assert (config.router_jitter_noise, config.attention_dropout) == (0.0, 0.0)
