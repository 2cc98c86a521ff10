"""A conversation with a model or two: what it reads, how answers are drawn, scored, picked and kept."""

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
/save NAME         keep the two answers to the last message as a preference; NAME is the better one:
                   a or b of two models, new or old of one model after /regenerate
/a /b /new /old    go on from this answer; otherwise it is the first model's, or the newest
/reset             begin a new conversation
/quit              leave, as Ctrl-D does; Ctrl-C only stops an answer"""


class Speaker(NamedTuple):
    """A model that answers."""

    name: str  # of its answers
    model: PreTrainedModel
    encoder: SegmentEncoder
    room: int  # tokens of the longest prompt that it reads


class Answer(NamedTuple):
    """What a model said, and what is wrong with it."""

    text: str
    flaws: list[str]  # stopped, cut off, empty


class Printer(TextStreamer):
    """Prints tokens as they come, and keeps them, also those of an answer that is stopped; not its end."""

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
    """A conversation, and the answers to its last message; from one of them it goes on."""

    def __init__(
        self, speakers: Sequence[Speaker], rewards: Sequence[RewardModel], options: ChatOptions
    ) -> None:
        self._speakers, self._rewards, self._options = speakers, rewards, options
        self._drawn = 0  # answers so far: each has a seed of its own
        self.reset()

    def reset(self) -> None:
        """Forget everything said."""
        self._prompt: list[Message] = []  # up to the user's last message
        self._answers: dict[str, Answer] = {}  # to it, by name
        self._picked = ""  # the name of the one to go on from, if the user said so

    def obey(self, command: str) -> None:
        """Do what a line that begins with / says. Raises UserError when it cannot be done."""
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
                self._pick(name[1:])
            case _:
                raise UserError(f"no command {command!r}; /help lists them")

    def say(self, text: str) -> None:
        """Answer a message. The one before is forgotten if it had no answer: templates want one to each."""
        # By name, the first model's comes before the second's, and new before old.
        names = [self._picked, *sorted(self._answers)]
        answer = next((self._answers[name].text for name in names if self._has_said(name)), "")
        settled = [*self._prompt, {"role": "assistant", "content": answer}] if answer else self._prompt[:-1]
        self._prompt, self._answers, self._picked = [*settled, {"role": "user", "content": text}], {}, ""
        self._respond()

    def _has_said(self, name: str) -> bool:
        return name in self._answers and bool(self._answers[name].text)

    def _respond(self) -> None:
        """Every model's answer to the last message; beside that of a single model stays the one before."""
        if not self._prompt:
            raise UserError("there is no message to answer yet")
        before = next((self._answers[name] for name in ("new", "old") if self._has_said(name)), None)
        self._answers, self._picked = ({"old": before} if before else {}), ""
        for speaker in self._speakers:
            answer = self._answers[speaker.name] = self._draw(speaker)
            scored = [f"score {self._score(answer.text):.3f}"] if self._rewards and answer.text else []
            if notes := [*answer.flaws, *scored]:
                print(f"({', '.join(notes)})")

    def _draw(self, speaker: Speaker) -> Answer:
        """Print an answer as it comes."""
        options, (name, model, encoder, room) = self._options, speaker
        row, is_cut = tokenize_prompt({"prompt": self._prompt}, encoder, room, "truncate_prompt")
        if is_cut:
            print(f"(more than the {room} tokens that there is room for: the oldest messages are left out)")
        if len(self._speakers) > 1:
            print(f"{name.upper()}: ", end="", flush=True)
        settings = GenerationConfig(
            max_new_tokens=options.max_response_length, do_sample=options.temperature > 0,
            temperature=options.temperature or 1.0, top_k=0, top_p=options.top_p,
            eos_token_id=model.end_ids, pad_token_id=encoder.tokenizer.pad_token_id,
            suppress_tokens=spare_ids(model) or None,
        )  # fmt: skip
        seed_everything(options.seed, self._drawn)
        self._drawn += 1
        printer, flaws = Printer(encoder, model.end_ids), []
        try:
            input_ids = torch.tensor([row.ids], device=device())  # (1, P)
            mask = torch.ones_like(input_ids)
            model.generate(input_ids, attention_mask=mask, generation_config=settings, streamer=printer)
            if not printer.has_ended:
                flaws.append(f"cut off after {options.max_response_length} tokens")
        except KeyboardInterrupt:
            printer.end()
            flaws.append("stopped")
        text = encoder.decode_response(row.ids, printer.ids).strip()
        return Answer(text, flaws if text else [*flaws, "empty"])

    def _score(self, answer: str) -> float:
        """What the reward models say of an answer, which each reads in its own tokens."""
        inputs = {}
        for encoder, _ in self._rewards:
            segments = dialogue_segments(self._prompt, answer, encoder.render, encoder.tokenizer.eos_token)
            inputs[encoder] = [encoder.encode(segments)[0]]
        return combine(member_scores(self._rewards, inputs, batch_size=1), self._options).item()

    def _pick(self, name: str) -> None:
        if name not in self._answers:
            raise UserError(f"there is no answer {name!r}")
        self._picked = name
        print(f"(the conversation goes on from {name})")

    def _save(self, better: str) -> None:
        """Add the two answers to the file."""
        path, names = self._options.save_to, sorted(self._answers)
        if not path:
            raise UserError("/save needs --save_to FILE.jsonl")
        if len(names) < 2:
            raise UserError("/save needs two answers: of two models, or of one model after /regenerate")
        if better not in names:
            raise UserError(f"say which answer is better: /save {names[0]} or /save {names[1]}")
        for name in names:
            if flaws := self._answers[name].flaws:
                raise UserError(f"not saved: {name} is not a whole answer ({', '.join(flaws)})")
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
