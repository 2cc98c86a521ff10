"""The conversation with one or two models: answers are sampled, scored, chosen and saved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from common.model.reward_ensemble import RewardModel, combine, member_scores
from common.model.vocabulary import spare_ids
from common.runtime.distributed import device, seed_everything
from common.runtime.options import UserError
from common.text.conversation import Message
from common.text.prompts import tokenize_prompt
from common.text.segments import dialogue_segments
from common.text.tokenizer import SegmentEncoder
from launch.chat.options import ChatOptions

HELP = """\
/regenerate        answer the last message again
/save NAME         save the two answers to the last message as a preference; NAME is the better one:
                   a or b of two models, new or old of one model after /regenerate
/a /b /new /old    continue from this answer; default: the first model's, or the newest
/reset             start a new conversation
/quit              leave, like Ctrl-D; Ctrl-C only stops an answer"""


class Speaker(NamedTuple):
    """A model that answers."""

    name: str  # of its answers
    model: PreTrainedModel
    encoder: SegmentEncoder
    max_prompt_length: int  # in tokens


class ChatAnswer(NamedTuple):
    """An answer and its flaws."""

    text: str
    flaws: list[str]  # stopped, truncated, empty


class Printer(TextStreamer):
    """Prints and collects tokens as they are sampled, without the end token, also of stopped answers."""

    def __init__(self, encoder: SegmentEncoder, end_ids: Sequence[int]) -> None:
        super().__init__(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.ids: list[int] = []
        self.has_ended = False
        self._end_ids = end_ids

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.has_ended = value.item() in self._end_ids
            if self.has_ended:
                return
            self.ids += value.tolist()
        super().put(value)


class Chat:
    """A conversation, and the answers to its last message."""

    def __init__(
        self, speakers: Sequence[Speaker], rewards: Sequence[RewardModel], options: ChatOptions
    ) -> None:
        self._speakers, self._rewards, self._options = speakers, rewards, options
        self._sampled = 0  # number of answers; each has its own seed
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self._prompt: list[Message] = []  # up to the user's last message
        self._answers: dict[str, ChatAnswer] = {}  # to it, by name
        self._chosen = ""  # name of the answer that the user chose to continue from

    def run_command(self, command: str) -> None:
        """Run a command, a line that starts with /. Raises UserError if it cannot be run."""
        match command.lower().split():
            case ["/help"]:
                print(HELP)
            case ["/reset"]:
                self.reset()
                print("(a new conversation)")
            case ["/regenerate"]:
                self._respond()
            case ["/save", *names]:
                self._save(" ".join(names))
            case ["/a" | "/b" | "/new" | "/old" as name]:
                self._choose(name[1:])
            case _:
                raise UserError(f"no command {command!r}; /help lists them")

    def send(self, text: str) -> None:
        """Send a message and answer it. An unanswered message is dropped: templates need an answer."""
        # In order of names: the first model before the second, and new before old.
        names = [self._chosen, *sorted(self._answers)]
        answer = next((self._answers[name].text for name in names if self._has_answered(name)), "")
        history = [*self._prompt, {"role": "assistant", "content": answer}] if answer else self._prompt[:-1]
        self._prompt, self._answers, self._chosen = [*history, {"role": "user", "content": text}], {}, ""
        self._respond()

    def _has_answered(self, name: str) -> bool:
        return name in self._answers and bool(self._answers[name].text)

    def _respond(self) -> None:
        """Sample every model's answer to the last message. With a single model, the previous answer stays."""
        if not self._prompt:
            raise UserError("there is no message to answer yet")
        before = next((self._answers[name] for name in ("new", "old") if self._has_answered(name)), None)
        self._answers, self._chosen = ({"old": before} if before else {}), ""
        for speaker in self._speakers:
            answer = self._answers[speaker.name] = self._sample(speaker)
            scored = [f"score {self._score(answer.text):.3f}"] if self._rewards and answer.text else []
            if notes := [*answer.flaws, *scored]:
                print(f"({', '.join(notes)})")

    def _sample(self, speaker: Speaker) -> ChatAnswer:
        """Sample an answer and print it as it is generated."""
        options, (name, model, encoder, limit) = self._options, speaker
        row, is_cut = tokenize_prompt({"prompt": self._prompt}, encoder, limit, "truncate_prompt")
        if is_cut:
            print(f"(the conversation exceeds {limit} tokens: the oldest messages are left out)")
        if len(self._speakers) > 1:
            print(f"{name.upper()}: ", end="", flush=True)
        settings = GenerationConfig(
            max_new_tokens=options.max_response_length, do_sample=options.temperature > 0,
            temperature=options.temperature or 1.0, top_k=0, top_p=options.top_p,
            eos_token_id=model.end_ids, pad_token_id=encoder.pad_token_id,
            suppress_tokens=spare_ids(model) or None,
        )  # fmt: skip
        seed_everything(options.seed, self._sampled)
        self._sampled += 1
        printer, flaws = Printer(encoder, model.end_ids), []
        try:
            input_ids = torch.tensor([row.ids], device=device())  # (1, P)
            mask = torch.ones_like(input_ids)
            model.generate(input_ids, attention_mask=mask, generation_config=settings, streamer=printer)
            if not printer.has_ended:
                flaws.append(f"truncated at {options.max_response_length} tokens")
        except KeyboardInterrupt:
            printer.end()
            flaws.append("stopped")
        text = encoder.decode_response(row.ids, printer.ids).strip()
        return ChatAnswer(text, flaws if text else [*flaws, "empty"])

    def _score(self, answer: str) -> float:
        """Score of an answer by the reward models, each with its own tokenizer."""
        inputs = {}
        for encoder, _ in self._rewards:
            segments = dialogue_segments(self._prompt, answer, encoder.render, encoder.tokenizer.eos_token)
            inputs[encoder] = [encoder.encode(segments)[0]]
        return combine(member_scores(self._rewards, inputs, size=1), self._options).item()

    def _choose(self, name: str) -> None:
        if name not in self._answers:
            raise UserError(f"there is no answer {name!r}")
        self._chosen = name
        print(f"(the conversation continues from {name})")

    def _save(self, better: str) -> None:
        """Append the two answers to the file as a preference."""
        path, names = self._options.save_to, sorted(self._answers)
        if not path:
            raise UserError("/save needs --save_to FILE.jsonl")
        if len(names) < 2:
            raise UserError("/save needs two answers: of two models, or of one model after /regenerate")
        if better not in names:
            raise UserError(f"name the better answer: /save {names[0]} or /save {names[1]}")
        for name in names:
            if flaws := self._answers[name].flaws:
                raise UserError(f"not saved: answer {name} is incomplete ({', '.join(flaws)})")
        (worse,) = set(names) - {better}
        chosen, rejected = self._answers[better].text, self._answers[worse].text
        if chosen == rejected:
            raise UserError("not saved: both answers are the same")
        record = {"prompt": self._prompt, "chosen": chosen, "rejected": rejected}
        try:
            with Path(path).open("ab+") as file:
                file.seek(max(file.tell() - 1, 0))
                line_end = "" if file.read(1) in (b"", b"\n") else "\n"  # of the last line, if it has none
                file.write(f"{line_end}{json.dumps(record)}\n".encode())
        except OSError as error:
            raise UserError(f"not saved: {path}: {error.strerror}") from None
        print(f"(saved: {better} is better than {worse})")
