"""Convert labelled steps of PRM800K and Math-Shepherd to `prompt`, `steps` and `labels`. Pure."""

import re
from typing import Any

Record = dict[str, Any]

STEP_TAG = " ки"  # ends each step in the `input` of Math-Shepherd
LABELS = {" +": 1, " -": 0}  # in its place in `label`
FIRST_STEP = re.compile(r"\s*(?=Step 1:)")
RATINGS = {1: 1, 0: None, -1: 0}  # of PRM800K: neutral steps are not labelled


def as_steps(record: Record) -> Record:
    """Convert a record of these formats; others are returned unchanged. Raises ValueError."""
    question, label, text = (record.get(name) for name in ("question", "label", "input"))
    if isinstance(question, dict) and isinstance(label, dict) and "steps" in label:
        return _from_prm800k(question, label)
    if isinstance(label, str) and isinstance(text, str) and STEP_TAG in text:
        return _from_math_shepherd(text, label)
    return record


def _from_prm800k(question: Record, label: Record) -> Record:
    """The path of chosen completions. A step without one ends it, with its first completion."""
    steps, labels = [], []
    try:
        for step in label["steps"]:
            chosen, human = step["chosen_completion"], step.get("human_completion")
            if chosen is None and human:
                steps.append(human["text"])
                labels.append(1)
                continue
            completion = step["completions"][chosen or 0]
            steps.append(completion["text"])
            labels.append(RATINGS[completion["rating"]] if completion["rating"] is not None else None)
            if chosen is None:
                break
        return {"prompt": question["problem"] + "\n", "steps": steps, "labels": labels}
    except (KeyError, IndexError, TypeError):
        raise ValueError("fields 'question' and 'label' are not those of a PRM800K record") from None


def _from_math_shepherd(text: str, label: str) -> Record:
    first, *others = text.removesuffix(STEP_TAG).split(STEP_TAG)
    prompt, *begin = FIRST_STEP.split(first, maxsplit=1)
    signs, rest = [], label
    for part in (first, *others):
        signs.append(LABELS.get(rest[len(part) : len(part) + 2]) if rest.startswith(part) else None)
        rest = rest[len(part) + 2 :]
    if not begin or None in signs:
        raise ValueError("field 'label' is not 'input' with + or - in place of ки, as in Math-Shepherd")
    steps = [step.strip() for step in (*begin, *others)]
    return {"prompt": prompt + "\n", "steps": steps, "labels": signs}
