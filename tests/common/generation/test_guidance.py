"""Heads of ILQL beside a policy: used in decoding, or a line in the log that they are not."""

import pytest
from torch import nn

from common.generation.guidance import guide
from common.model.q_heads import Heads, q_heads, save_heads
from tests.common.generation.test_steps import make_model


@pytest.mark.parametrize(
    ("saved", "beta", "is_guided"),
    [(2.0, -1.0, True), (2.0, 0.0, False), (0.0, -1.0, False), (0.0, 3.0, True)],
)
def test_a_folder_with_heads_is_decoded_with_or_without_them(tmp_path, capsys, saved, beta, is_guided):
    model = make_model("llama")
    size = model.config.hidden_size, model.config.vocab_size
    save_heads(tmp_path, Heads(*size).state_dict(), q_heads(*size).state_dict(), beta=saved)
    guide(model, str(tmp_path), beta)
    out = capsys.readouterr().out
    assert (f"{tmp_path}: decodes with its heads" in out) == is_guided
    assert (f"{tmp_path}: decodes with the policy alone, without its heads" in out) != is_guided
    assert bool(model._forward_hooks) == is_guided


def test_no_line_for_a_folder_without_heads(tmp_path, capsys):
    assert isinstance(guide(make_model("llama"), str(tmp_path), -1.0), nn.Module)
    assert not capsys.readouterr().out
