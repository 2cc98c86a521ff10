"""Demonstrations from a model that criticises and revises its own answers by a constitution.

    bash launch/critique.sh --model_name_or_path DIR_OR_HUB_ID --prompt_data F.jsonl --output_dir DIR

writes DIR/demonstrations.jsonl for step 1, and DIR/report.json. Source: Bai et al. 2022 (Constitutional AI),
section 3: a draft, then rounds of critique and revision, each by a principle drawn at random.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from common.ai_feedback.constitution import (
    as_text,
    draw_principle,
    fill,
    load_assistant,
    read_constitution,
    read_template,
)
from common.data.journal import to_lines, work_through
from common.data.loading import load_examples
from common.generation.generate import PolicyAnswer, check_generation, load_policy, sample_answers
from common.model.families import position_limit
from common.model.roles import policy_config
from common.model.zero import load_zero_config
from common.numeric.intervals import format_share, share
from common.runtime.distributed import init_distributed, log, rank
from common.runtime.files import write_json, write_text
from common.runtime.option_parser import parse_options
from common.runtime.options import CacheOptions, DataOptions, OptimiserOptions, world_size
from common.runtime.process import run_main
from common.text.conversation import Message
from common.text.prompts import Prompt, prompt
from common.text.record_formats import Record
from common.text.segments import find_prompt
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped
from common.training.run_folder import prepare_output
from step1_sft.options import CritiqueOptions

CRITIQUE_PLACES = ("prompt", "response", "principle")
REVISION_PLACES = (*CRITIQUE_PLACES, "critique")


def main() -> None:
    # 1. Everything that can be wrong is found before a model is loaded.
    options = parse_options(CritiqueOptions)
    principles = read_constitution(options.constitution)
    templates = (
        read_template("critique_template", options.critique_template, CRITIQUE_PLACES),
        read_template("revision_template", options.revision_template, REVISION_PLACES),
    )
    config = policy_config(options.model_name_or_path, "model_name_or_path")
    check_generation(options, config)
    as_trained = OptimiserOptions(global_batch_size=world_size(), micro_batch_size=1)
    zero = load_zero_config(options.zero_config, as_trained, learning_rate=1.0)
    encoder = load_assistant(options)
    rows = load_prompts(options, encoder)
    init_distributed(options.timeout_minutes)
    prepare_output(options, {"tokenizer": encoder.tokenizer})

    # 2. As many prompts at once as fill a batch of every rank; what an earlier run has done is kept.
    policy = load_policy(options.model_name_or_path, encoder, zero)
    positions = position_limit(config) or math.inf
    model = Model(policy, encoder, options, positions - options.max_response_length - 1)
    work = partial(revise, model=model, principles=principles, templates=templates, options=options)
    size = options.generation_batch_size * world_size()
    records = work_through(rows, work, Path(options.output_dir) / "journal", size, "prompts")

    # 3. What was found.
    if rank() == 0:
        write_results(records, Path(options.output_dir))


def load_prompts(options: CritiqueOptions, encoder: SegmentEncoder) -> list[Prompt]:
    """All prompts; one that is too long for a draft loses its beginning. Raises UserError."""
    given = {field.name: getattr(options, field.name) for field in fields(CacheOptions)}
    how = DataOptions(eval_fraction=0.0, **given)
    convert = partial(
        prompt, encoder=encoder, max_length=options.max_prompt_length, overlong="truncate_prompt"
    )
    rows, _ = load_examples(options.prompt_data, how, Prompt, convert)
    return list(rows)


class Model:
    """What is asked. An answer depends on the numbers of the record and of the step, and on the seed."""

    def __init__(
        self, policy: nn.Module, encoder: SegmentEncoder, options: CritiqueOptions, room: float
    ) -> None:
        """room: the longest question in tokens."""
        self._sample = partial(sample_answers, policy, encoder, options=options)
        self._encode = partial(prompt, encoder=encoder, max_length=room, overlong="drop")

    def answer(self, prompts: Mapping[int, list[int]], step: int) -> dict[int, PolicyAnswer]:
        """An answer to each prompt of token ids, by the number of its record."""
        return self._sample(prompts, step=step) if prompts else {}

    def ask(self, questions: Mapping[int, list[Message]], step: int) -> dict[int, PolicyAnswer]:
        """An answer to each question that leaves the model room for one."""
        prompts = {}
        for place, question in questions.items():
            with contextlib.suppress(Dropped):
                prompts[place] = self._encode({"prompt": question})[0].ids
        return self.answer(prompts, step)


def revise(
    rows: Mapping[int, Prompt], model: Model, principles: Sequence[str], templates: tuple[str, str],
    options: CritiqueOptions,
) -> list[Record]:  # fmt: skip
    """A record for each prompt: draft, trace and completion, which is empty when no answer came to its end.

    A revision that is empty or cut off changes nothing, and neither does one there is no room to ask for.
    """
    drafts = model.answer({place: row.ids for place, row in rows.items()}, step=0)
    prompts = {place: find_prompt(row.record) for place, row in rows.items()}
    answers, traces = dict(drafts), {place: [] for place in rows}
    for number in range(options.revision_rounds):
        step = 1 + 2 * number
        texts = {
            place: {
                "prompt": as_text(asked),
                "response": answers[place].text.strip(),
                "principle": draw_principle(principles, asked, options.seed, number),
            }
            for place, asked in prompts.items()
        }
        questions = {place: fill(templates[0], **parts) for place, parts in texts.items()}
        critiques = model.ask(questions, step)
        for place, critique in critiques.items():
            texts[place]["critique"] = critique.text.strip()
        questions = {place: fill(templates[1], **texts[place]) for place in critiques}
        revisions = model.ask(questions, step + 1)
        for place, revision in revisions.items():
            is_used = revision.ended and bool(revision.text.strip())
            answers[place] = revision if is_used else answers[place]
            said = {name: texts[place][name] for name in ("principle", "critique")}
            traces[place].append({**said, "revision": revision.text.strip(), "is_used": is_used})
    return [demonstration(row, drafts[place], answers[place], traces[place]) for place, row in rows.items()]


def demonstration(
    row: Prompt, draft: PolicyAnswer, answer: PolicyAnswer, trace: list[dict[str, Any]]
) -> Record:
    """What step 1 reads, with what led to it. A verbatim prompt keeps the space that the draft began with."""
    asked = find_prompt(row.record)
    begin = draft.text[: -len(draft.text.lstrip())] if isinstance(asked, str) else ""
    text = answer.text.strip() if answer.ended else ""
    completion = f"{begin}{text}" if text else ""
    return {
        "prompt": asked,
        "completion": completion,
        "draft": f"{begin}{draft.text.strip()}",
        "trace": trace,
    }


def write_results(records: Sequence[Record], folder: Path) -> None:
    """The demonstrations, and figures about them."""
    kept = [record for record in records if record["completion"]]
    write_text(folder / "demonstrations.jsonl", to_lines(kept))
    figures = measure(records)
    write_json(folder / "report.json", figures)
    log(f"\n{describe(figures)}\n\ndemonstrations.jsonl and report.json: {folder}")


def measure(records: Sequence[Record]) -> dict[str, Any]:
    """Figures about the demonstrations, and how many prompts have become none; lengths in characters."""
    kept = [record for record in records if record["completion"]]
    changed = [record["completion"] != record["draft"] for record in kept]
    trace = [step for record in records for step in record["trace"]]
    return {
        "prompts": len(records),
        "demonstrations": len(kept),
        "revisions": len(trace),
        "revisions_used": sum(step["is_used"] for step in trace),
        "changed": share(sum(changed), len(kept)),
        "draft_length": sum(len(record["draft"]) for record in kept) / max(1, len(kept)),
        "completion_length": sum(len(record["completion"]) for record in kept) / max(1, len(kept)),
    }


def describe(figures: dict[str, Any]) -> str:
    """The figures as text."""
    left_out = figures["prompts"] - figures["demonstrations"]
    lines = [
        f"{figures['demonstrations']} demonstrations; {left_out} prompts left out, whose answers were empty"
        " or longer than --max_response_length",
        f"changed by revision: {format_share(figures['changed'])}",
        f"revisions used: {figures['revisions_used']} of {figures['revisions']}; others are empty or cut off",
        f"mean characters: {figures['draft_length']:.0f} before, {figures['completion_length']:.0f} after",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
