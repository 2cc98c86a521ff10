"""Demonstrations from answers that a model critiques and revises by a constitution.

    bash launch/critique.sh --model_name_or_path DIR_OR_HUB_ID --prompt_data F.jsonl --output_dir DIR

writes DIR/demonstrations.jsonl for step 1, and DIR/report.json. Source: Bai et al. 2022 (Constitutional AI),
section 3: a draft, then rounds of critique and revision, each by a randomly drawn principle.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

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
from common.generation.engine_checks import check_rollout_engine
from common.generation.generate import PolicyAnswer, Sampler, fit_prompt_length, load_sampler, sample_answers
from common.model.families import max_positions
from common.model.roles import policy_config
from common.model.zero import load_inference_config
from common.numeric.intervals import format_share, share
from common.runtime.distributed import init_distributed, log, rank
from common.runtime.files import write_json, write_text
from common.runtime.option_parser import parse_options
from common.runtime.options import CacheOptions, DataOptions, world_size
from common.runtime.process import run_main
from common.text.conversation import Message
from common.text.prompts import Prompt, tokenize_prompt
from common.text.record_formats import Record
from common.text.segments import find_prompt
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped
from common.training.run_folder import prepare_output
from step1_sft.options import CritiqueOptions

CRITIQUE_FIELDS = ("prompt", "response", "principle")
REVISION_FIELDS = (*CRITIQUE_FIELDS, "critique")


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(CritiqueOptions)
    principles = read_constitution(options.constitution)
    templates = (
        read_template("critique_template", options.critique_template, CRITIQUE_FIELDS),
        read_template("revision_template", options.revision_template, REVISION_FIELDS),
    )
    config = policy_config(options.model_name_or_path, "model_name_or_path")
    options = fit_prompt_length(options, config)
    check_rollout_engine(options, config)
    zero = load_inference_config(options)
    encoder = load_assistant(options)
    rows = load_prompts(options, encoder)
    init_distributed(options.timeout_minutes)
    prepare_output(options, {"tokenizer": encoder.tokenizer})

    # 2. Process one generation batch per rank at a time; resume from the journal.
    longest = max_positions(config) - 1
    policy = load_sampler(options.model_name_or_path, encoder, zero, options, longest)
    model = Assistant(policy, encoder, options, longest - options.max_response_length)
    work = partial(revise, model=model, principles=principles, templates=templates, options=options)
    size = options.generation_batch_size * world_size()
    records = work_through(rows, work, Path(options.output_dir) / "journal", size, "prompts")

    # 3. Write the results.
    if rank() == 0:
        write_results(records, Path(options.output_dir))


def load_prompts(options: CritiqueOptions, encoder: SegmentEncoder) -> list[Prompt]:
    """Load and tokenise the prompts. The beginning of an overlong prompt is truncated. Raises UserError."""
    cache_options = {field.name: getattr(options, field.name) for field in fields(CacheOptions)}
    data_options = DataOptions(eval_fraction=0.0, **cache_options)
    convert = partial(
        tokenize_prompt, encoder=encoder, max_length=options.max_prompt_length, overlong="truncate_prompt"
    )
    rows, _ = load_examples(options.prompt_data, data_options, Prompt, convert)
    return list(rows)


class Assistant:
    """The model under revision. Sampling depends only on seed, record number and step."""

    def __init__(
        self, policy: Sampler, encoder: SegmentEncoder, options: CritiqueOptions, max_prompt_length: int
    ) -> None:
        self._sample = partial(sample_answers, policy, encoder, options=options)
        self._encode = partial(
            tokenize_prompt, encoder=encoder, max_length=max_prompt_length, overlong="drop"
        )

    def answer(self, prompts: Mapping[int, list[int]], step: int) -> dict[int, PolicyAnswer]:
        """Answer prompts of token ids, keyed by record number."""
        return self._sample(prompts, step=step) if prompts else {}

    def ask(self, questions: Mapping[int, list[Message]], step: int) -> dict[int, PolicyAnswer]:
        """Answer questions, but for those that exceed the context length."""
        prompts = {}
        for index, question in questions.items():
            with contextlib.suppress(Dropped):
                prompts[index] = self._encode({"prompt": question})[0].ids
        return self.answer(prompts, step)


def revise(
    rows: Mapping[int, Prompt], model: Assistant, principles: Sequence[str], templates: tuple[str, str],
    options: CritiqueOptions,
) -> list[Record]:  # fmt: skip
    """Draft, critique and revise an answer to each prompt; one record per prompt.

    Empty and truncated revisions are discarded, questions that exceed the context length are skipped. The
    completion is empty where no answer ended.
    """
    critique_template, revision_template = templates
    drafts = model.answer({index: row.ids for index, row in rows.items()}, step=0)
    prompts = {index: find_prompt(row.record) for index, row in rows.items()}
    answers, traces = dict(drafts), {index: [] for index in rows}
    for number in range(options.revision_rounds):
        step = 1 + 2 * number
        parts = {
            index: {
                "prompt": as_text(text),
                "response": answers[index].text.strip(),
                "principle": draw_principle(principles, text, options.seed, number),
            }
            for index, text in prompts.items()
        }
        questions = {index: fill(critique_template, **part) for index, part in parts.items()}
        critiques = model.ask(questions, step)
        for index, critique in critiques.items():
            parts[index]["critique"] = critique.text.strip()
        questions = {index: fill(revision_template, **parts[index]) for index in critiques}
        revisions = model.ask(questions, step + 1)
        for index, revision in revisions.items():
            is_used = revision.ended and bool(revision.text.strip())
            answers[index] = revision if is_used else answers[index]
            traces[index].append(
                {name: parts[index][name] for name in ("principle", "critique")}
                | {"revision": revision.text.strip(), "is_used": is_used}
            )
    return [
        demonstration_record(row, drafts[index], answers[index], traces[index]) for index, row in rows.items()
    ]


def demonstration_record(
    row: Prompt, draft: PolicyAnswer, answer: PolicyAnswer, trace: list[dict[str, Any]]
) -> Record:
    """Make a record for step 1, with its draft and trace. A string prompt keeps the draft's leading space."""
    prompt_text = find_prompt(row.record)
    space = draft.text[: -len(draft.text.lstrip())] if isinstance(prompt_text, str) else ""
    text = answer.text.strip() if answer.ended else ""
    return {
        "prompt": prompt_text,
        "completion": f"{space}{text}" if text else "",
        "draft": f"{space}{draft.text.strip()}",
        "trace": trace,
    }


def write_results(records: Sequence[Record], folder: Path) -> None:
    """Write the demonstrations and report.json."""
    demonstrations = [record for record in records if record["completion"]]
    write_text(folder / "demonstrations.jsonl", to_lines(demonstrations))
    metrics = critique_metrics(records)
    write_json(folder / "report.json", metrics)
    log(f"\n{format_critique_metrics(metrics)}\n\ndemonstrations.jsonl and report.json: {folder}")


def critique_metrics(records: Sequence[Record]) -> dict[str, Any]:
    """Counts, revision rates, and mean lengths in characters."""
    demonstrations = [record for record in records if record["completion"]]
    changed = [record["completion"] != record["draft"] for record in demonstrations]
    trace = [step for record in records for step in record["trace"]]
    count = len(demonstrations)
    return {
        "prompts": len(records),
        "demonstrations": count,
        "revisions": len(trace),
        "revisions_used": sum(step["is_used"] for step in trace),
        "changed": share(sum(changed), count),
        "draft_length": sum(len(record["draft"]) for record in demonstrations) / max(1, count),
        "completion_length": sum(len(record["completion"]) for record in demonstrations) / max(1, count),
    }


def format_critique_metrics(metrics: dict[str, Any]) -> str:
    """Format the metrics as text."""
    dropped = metrics["prompts"] - metrics["demonstrations"]
    lines = [
        f"{metrics['demonstrations']} demonstrations; {dropped} prompts dropped: answer empty, or longer than"
        " --max_response_length",
        f"changed by revision: {format_share(metrics['changed'])}",
        f"revisions used: {metrics['revisions_used']} of {metrics['revisions']}; the others are empty or"
        " truncated",
        f"mean length in characters: {metrics['draft_length']:.0f} before revision,"
        f" {metrics['completion_length']:.0f} after",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
