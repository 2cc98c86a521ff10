"""Chat in the terminal with one model, or with two side by side.

    bash launch/chat.sh --model_name_or_path OUT3/final
    bash launch/chat.sh --model_name_or_path OUT3/final OUT1/final --save_to pairs.jsonl

The prompt is rendered as in training. Saved preferences are data for step 2.
"""

import readline  # noqa: F401 - gives `input` line editing and a history
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from common.generation.guidance import check_guidance, guide
from common.model.engine import make_frozen
from common.model.families import max_positions
from common.model.loading import load_causal_lm, plain_config
from common.model.reward_ensemble import load_encoders, load_members
from common.model.roles import policy_config
from common.runtime.distributed import on_cpu
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from common.runtime.process import SIGNALS, run_main
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from launch.chat.options import ChatOptions
from launch.chat.session import Chat, Speaker


def main() -> None:
    # 1. Check options before a model is loaded. A signal ends the chat at once: there is nothing to save.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    options = parse_options(ChatOptions)
    paths = options.model_name_or_path
    if len(paths) > 2:
        raise UserError(f"--model_name_or_path {' '.join(paths)}: must be one model or two")
    check_save_to(options.save_to)
    encoders = [SegmentEncoder(load_tokenizer(path)) for path in paths]
    check_guidance(paths, options)
    limits = [max_prompt_length(path, e, options) for path, e in zip(paths, encoders, strict=True)]
    reward_encoders = load_encoders(options, *encoders)

    # 2. The models.
    zero = plain_config(not on_cpu(), options.attn_implementation)
    models = [load_model(path, e, zero, options.ilql_beta) for path, e in zip(paths, encoders, strict=True)]
    names = ["a", "b"] if len(paths) > 1 else ["new"]
    speakers = [Speaker(*parts) for parts in zip(names, models, encoders, limits, strict=True)]
    chat = Chat(speakers, load_members(options, reward_encoders, zero), options)

    # 3. The conversation.
    for speaker, path in zip(speakers, paths, strict=True):
        print(f"{speaker.name.upper()}: {path}" if len(paths) > 1 else path)
    print("/help lists the commands")
    converse(chat)


def check_save_to(path: str) -> None:
    """Raise UserError for a file to which preferences cannot be appended. An empty path is allowed."""
    if path and not path.endswith(".jsonl"):
        raise UserError(f"--save_to {path}: must end in .jsonl, as step 2 requires")
    if not Path(path).parent.is_dir():
        raise UserError(f"--save_to {path}: there is no such folder")


def max_prompt_length(path: str, encoder: SegmentEncoder, options: ChatOptions) -> int:
    """Longest prompt in tokens that leaves room for a response. Raises UserError if none does."""
    config = policy_config(path, "model_name_or_path")
    positions = max_positions(config)
    limit = positions - options.max_response_length
    if limit <= len(encoder.bos):
        raise UserError(
            f"--max_response_length {options.max_response_length}: leaves no room for a prompt"
            f" in the {positions} positions of {path}"
        )
    return limit


def load_model(path: str, encoder: SegmentEncoder, zero: dict[str, Any], ilql_beta: float) -> PreTrainedModel:
    """A frozen model on the device, without its own generation defaults (penalties, minimum length)."""
    model = make_frozen(guide(load_causal_lm(path, encoder.tokenizer, zero), path, ilql_beta), None)
    model.generation_config = GenerationConfig()
    return model


def converse(chat: Chat) -> None:
    """Read messages and commands, one per line, until /quit or the end of the input."""
    sys.stdin.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            line = input("\n> ").strip()
            if line == "/quit":
                return
            if line:
                chat.run_command(line) if line.startswith("/") else chat.send(line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except ValueError as error:  # a wrong command, or a conversation that the chat template refuses
            print(f"error: {error}")


if __name__ == "__main__":
    run_main(main)
