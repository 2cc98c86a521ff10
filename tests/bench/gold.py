"""Judges that no training sees, as functions for --gold_function."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def market(prompts: list[Any], responses: list[str], records: list[dict]) -> list[float]:  # noqa: ARG001
    """The rule of the quickstart's world, 1 at best."""
    from launch.quickstart.world import gold_score

    return [
        gold_score(prompt if isinstance(prompt, str) else prompt[-1]["content"], response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def sentiment(prompts: list[Any], responses: list[str], records: list[dict]) -> list[float]:  # noqa: ARG001
    """VADER's sentiment, between -1 and 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return [analyser.polarity_scores(response)["compound"] for response in responses]
