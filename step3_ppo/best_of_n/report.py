"""The report of rejection sampling as text: responses selected, and reasons why others were not. Pure."""

from collections.abc import Mapping
from typing import Any

MANY = 0.25  # share of responses unusable for one reason, above which advice is given


def describe_selection(report: Mapping[str, Any]) -> str:
    """One line: demonstrations and pairs, their scores, and unused responses."""
    line = (
        f"kept {report['demonstrations']} of {report['samples']} responses (mean score"
        f" {report['score_of_demonstrations']:.3f}; all: {report['score']['mean']:.3f}),"
        f" {report['preferences']} pairs"
    )
    if not report["preferences"] and report["selection"]["pairs"] != "none":
        line += " (no prompt has two usable responses of different scores)"
    unused = report["unused"]
    if losses := describe_unused(unused, report["max_response_length"]):
        line += f"; {losses}{advise(unused, report['samples'])}"
    return line


def describe_unused(unused: Mapping[str, int], max_response_length: int) -> str:
    """Unused responses by reason; empty when all are usable."""
    texts = {
        "cut": f"cut at {max_response_length} tokens",
        "empty": "empty",
        "repeated": "identical to another response to the same prompt",
    }
    return ", ".join(f"{unused[name]} {text}" for name, text in texts.items() if unused[name])


def advise(unused: Mapping[str, int], total: int) -> str:
    """Advice after a colon; empty when no reason is frequent."""
    advice = {
        "cut": "pass --keep_truncated, or raise --max_response_length in another --output_dir",
        "empty": "use a policy that answers these prompts, in another --output_dir",
        "repeated": "raise --temperature in another --output_dir",
    }
    chosen = [text for name, text in advice.items() if unused[name] > MANY * total]
    return f": {'; '.join(chosen)}" if chosen else ""
