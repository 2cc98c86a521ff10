"""Scored responses: `prompt`, `response` or `completion`, and `score`. Pure."""

from common.text.fields import Record, number

LARGEST = 1e6  # size of a score; beyond it, squared errors in fp32 have no digits left


def as_completion(record: Record) -> Record:
    """A record with `prompt`, `response` and `score` as a demonstration with a score; others as they are.

    Raises ValueError for an empty response, under the name of its field.
    """
    if {"prompt", "response", "score"} <= record.keys() and "completion" not in record:
        response = record["response"]
        if not (response.strip() if isinstance(response, str) else response):
            raise ValueError("field 'response' is empty")
        return {**record, "completion": response}
    return record


def read_score(record: Record) -> float:
    """The score of a response. Raises ValueError with a message for the user."""
    if "score" not in record:
        raise ValueError("field 'score' is missing (a scored response has 'prompt' + 'response' + 'score')")
    if abs(score := number(record, "score")) > LARGEST:
        raise ValueError(f"field 'score' is {score:g}; allowed: -{LARGEST:g} to {LARGEST:g}")
    return score
