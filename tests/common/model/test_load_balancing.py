"""Load-balancing loss of mixtures of experts, against transformers."""

import inspect
import math

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from common.model import families
from common.model.forward import label_pass, last_positions, token_scores
from common.model.head import Targets
from common.model.load_balancing import (
    Routing,
    balance_loss,
    count_routing,
    has_balance_loss,
    router_figures,
)
from common.training.expert_use import ExpertUse
from step1_sft.loss import sft_loss
from tests.conftest import assert_close

SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0,
    "output_router_logits": True, "router_aux_loss_coef": 0.5,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MIXTURES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=8),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=4),
    "qwen3_moe, one dense layer": Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=4, mlp_only_layers=[0]),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=4),
}
LENGTHS = [9, 5]
IDS = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(9) < torch.tensor(LENGTHS)[:, None]  # (2, 9)
IDS = IDS.masked_fill(~MASK, 0)
LOSS_MASK = MASK & (torch.arange(9) >= 3)


def build(config: PretrainedConfig, kind: type = AutoModelForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    config.num_labels = 1
    return kind.from_config(config).train()


def logprobs(model: PreTrainedModel, rows: Tensor | slice) -> Tensor:
    mask = LOSS_MASK[rows]
    return label_pass(model, IDS[rows], mask.roll(-1, dims=1), Targets(IDS[rows][mask])).logprobs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_loss_and_gradients_match_transformers(name: str, checkpointing: bool) -> None:
    """With padding: transformers uses an attention mask, Triptych passes none."""
    model = build(MIXTURES[name])
    expected = model(input_ids=IDS, attention_mask=MASK.long(), labels=IDS.masked_fill(~LOSS_MASK, -100))
    assert expected.aux_loss > 1
    expected.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for batches in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model.zero_grad(set_to_none=True)
        experts = ExpertUse(model, lambda rows: logprobs(model, rows), batches)
        assert model.training
        total = 0.0
        for rows in batches:
            loss = sft_loss(logprobs(model, rows), int(LOSS_MASK.sum())) + experts.loss()
            loss.backward()
            total = total + loss.detach()
        assert_close(total, expected.loss)
        assert_close(experts.metrics()["train/aux_loss"].value, 0.5 * expected.aux_loss.item())
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, gradients[name])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_loss_of_a_scalar_model_matches_transformers(name: str) -> None:
    """transformers has no such loss for its classifiers: it is that of the router logits of the backbone."""
    model = build(MIXTURES[name], AutoModelForSequenceClassification)
    backbone = model.model(input_ids=IDS, attention_mask=MASK.long(), output_router_logits=True)
    loss_function = inspect.getmodule(type(model)).load_balancing_loss_func
    expected = 0.5 * loss_function(backbone.router_logits, 4, 2, MASK.long())
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("gate" in name for name in gradients)
    for batches in ([[0, 1]], [[1], [0]]):
        model.zero_grad(set_to_none=True)

        def scores(rows: list[int]) -> Tensor:
            return token_scores(model, IDS[rows], last_positions(torch.tensor(LENGTHS)[rows], 9))

        experts = ExpertUse(model, scores, batches)
        total = 0.0
        for rows in batches:
            scores(rows)
            loss = experts.loss()
            loss.backward()
            total = total + loss.detach()
        assert_close(total, expected.detach())
        for name, gradient in gradients.items():
            assert_close(model.get_parameter(name).grad, gradient)


def test_balance_loss_by_hand() -> None:
    """Two layers, three tokens, of which one is padding; the best of two experts is chosen."""
    logits = [
        torch.tensor([[0.0, math.log(3)]] * 3),
        torch.tensor([[math.log(4), 0.0], [0.0, 0.0], [9.0, 0.0]]),
    ]
    routing = count_routing(logits, torch.tensor([[True, True, False]]), top_k=1)
    assert routing.tokens == 2
    assert_close(routing.chosen, torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    assert_close(routing.probabilities, torch.tensor([[0.5, 1.5], [1.3, 0.7]]))
    shares, means = (0.5, 0.5), (1.8 / 4, 2.2 / 4)
    expected = 2 * sum(share * mean for share, mean in zip(shares, means, strict=True))
    assert_close(balance_loss(routing.probabilities, routing.chosen, routing.tokens), torch.tensor(expected))


def test_router_figures_by_hand() -> None:
    chosen = torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    routing = Routing(chosen, chosen, torch.tensor([2.0, 4.0]), torch.tensor(4.0))
    assert router_figures(routing) == {
        "router/max_load": (4 * 3 / 4 + 4 * 1 / 4) / 2, "router/entropy": (2 / 4 + 4 / 4) / 2,
        "router/unused": 2 / 8,
    }  # fmt: skip


def test_figures_without_the_loss_and_without_dummies() -> None:
    """The statistics of a mixture whose loss is off; a dummy batch counts nothing."""
    model = build(MixtralConfig(**SHAPE | {"output_router_logits": False}, num_local_experts=4))
    metrics = []
    for batches in ([0], [0, 1]):
        experts = ExpertUse(model, lambda _: pytest.fail("nothing to count"), batches)
        for row in batches:
            logprobs(model, slice(row, row + 1))
            assert experts.loss(is_real=row == 0) == 0.0
        metrics.append(experts.metrics())
    assert metrics[0].keys() == {"router/max_load", "router/entropy", "router/unused"}
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=8, vocab_size=40),
        MixtralConfig(**SHAPE | {"output_router_logits": False}),
        MixtralConfig(**SHAPE | {"router_aux_loss_coef": 0.0}),
    ],
)
def test_models_without_the_loss_return_zero(config: PretrainedConfig) -> None:
    model = build(config)
    assert not has_balance_loss(model)
    experts = ExpertUse(model, lambda _: pytest.fail("nothing to count"), [0, 1])
    logprobs(model, slice(0, 2))
    assert experts.loss() == 0.0


def test_router_jitter_and_dropout_are_turned_off() -> None:
    config = MixtralConfig(**SHAPE, router_jitter_noise=0.3, attention_dropout=0.1)
    families.remove_noise(config)
    assert (config.router_jitter_noise, config.attention_dropout) == (0.0, 0.0)
