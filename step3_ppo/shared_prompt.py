"""Whether the responses to a prompt share a row with it in scoring and updates."""

from dataclasses import replace
from typing import Literal

from common.model.forward import base_model
from common.model.shared_prompt import SEPARATE, Sharing, responses_per_row, wants_sharing, work
from common.runtime.distributed import log_once
from step3_ppo.models import Models
from step3_ppo.options import PPOOptions
from step3_ppo.rollout import Rollout


def share_prompts(models: Models, rollout: Rollout, options: PPOOptions) -> Rollout:
    """Let responses to one prompt share a row, by --share_prompts, and as actor and critic allow.

    Every rank must call this.
    """
    sharing = Sharing(options.responses_per_row, options.max_prompt_length, options.max_response_length)
    hidden_size = base_model(models.actor).config.get_text_config().hidden_size
    if not is_less_work(rollout, sharing, hidden_size, options.share_prompts):
        return rollout
    trained = [models.actor, models.critic] if models.critic else [models.actor]
    if min([responses_per_row(model, sharing) for model in trained]) == 1:
        return rollout
    log_once(f"each prompt is encoded once for {sharing.responses} responses in scoring and updates")
    return replace(rollout, sharing=sharing)


def is_less_work(
    rollout: Rollout, sharing: Sharing, hidden_size: int, how: Literal["auto", "yes", "no"]
) -> bool:
    """Whether responses should share rows, if a model of this size can: by --share_prompts and the tokens."""
    if sharing.responses == 1:
        return False
    rows = range(len(rollout.scores))
    works = [
        work(
            [(1, length) for length in replace(rollout, sharing=one).units(rows)[1]],
            hidden_size,
            one is sharing,
        )
        for one in (SEPARATE, sharing)
    ]
    return wants_sharing(how, *works)
