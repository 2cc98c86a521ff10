"""A chat in the terminal with a model, or with two whose answers are compared.

    bash launch/chat.sh --model_name_or_path OUT3/final
    bash launch/chat.sh --model_name_or_path OUT3/final OUT1/final --save_to pairs.jsonl

A model reads the conversation as in training, and what is saved is data for step 2.
"""

import readline  # noqa: F401 - gives `input` a history, and its line can be edited
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from common.model.engine import make_frozen
from common.model.families import position_limit
from common.model.loading import load_causal_lm
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
    # 1. What can be wrong is found before a model is loaded. There is nothing to save, so a signal ends it.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    options = parse_options(ChatOptions)
    paths = options.model_name_or_path
    if len(paths) > 2:
        raise UserError(f"--model_name_or_path {' '.join(paths)}: must be one model or two")
    check_save_to(options.save_to)
    encoders = [SegmentEncoder(load_tokenizer(path)) for path in paths]
    rooms = [prompt_room(path, e, options) for path, e in zip(paths, encoders, strict=True)]
    reward_encoders = load_encoders(options, *encoders)

    # 2. The models.
    zero = {"bf16": {"enabled": not on_cpu()}, "zero_optimization": {"stage": 0}}
    models = [load_model(path, e, zero) for path, e in zip(paths, encoders, strict=True)]
    names = ["a", "b"] if len(paths) > 1 else ["new"]
    speakers = [Speaker(*parts) for parts in zip(names, models, encoders, rooms, strict=True)]
    chat = Chat(speakers, load_members(options, reward_encoders, zero), options)

    # 3. The conversation.
    for speaker, path in zip(speakers, paths, strict=True):
        print(f"{speaker.name.upper()}: {path}" if len(paths) > 1 else path)
    print("/help lists the commands")
    converse(chat)


def check_save_to(path: str) -> None:
    """Raise UserError unless preferences can be added to the file, or there is none to be."""
    if path and not path.endswith(".jsonl"):
        raise UserError(f"--save_to {path}: must end in .jsonl, by which step 2 knows it")
    if not Path(path).parent.is_dir():
        raise UserError(f"--save_to {path}: there is no such folder")


def prompt_room(path: str, encoder: SegmentEncoder, options: ChatOptions) -> int:
    """How many tokens of a prompt the model's positions leave; UserError when they leave none."""
    config = policy_config(path, "model_name_or_path")
    positions = position_limit(config) or sys.maxsize
    room = positions - options.max_response_length
    if room <= len(encoder.bos):
        raise UserError(
            f"--max_response_length {options.max_response_length}: leaves no room for a prompt"
            f" in the {positions} positions of {path}"
        )
    return room


def load_model(path: str, encoder: SegmentEncoder, zero: dict[str, Any]) -> PreTrainedModel:
    """A frozen model on the device, without generation defaults of its own (penalties, minimal lengths)."""
    model = make_frozen(load_causal_lm(path, encoder.tokenizer, zero), None)
    model.generation_config = GenerationConfig()
    return model


def converse(chat: Chat) -> None:
    """Messages and commands, a line each, up to /quit or the end of the input."""
    sys.stdin.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            line = input("\n> ").strip()
            if line == "/quit":
                return
            if line:
                chat.obey(line) if line.startswith("/") else chat.say(line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except ValueError as error:  # a command amiss, or a conversation that a chat template refuses
            print(f"error: {error}")


if __name__ == "__main__":
    run_main(main)
