"""The synthetic task of the quickstart, a market hall: questions, answers of mixed quality, and the gold
rule.

A question is about the place or the price of one kind of goods. The best answer has four sentences: a kind
word, the fact, a tip that fits the question, an offer. Demonstrations get some of these right and some wrong.

`gold_score` scores an answer sentence by sentence, so longer answers gain nothing: repeated, flattering,
curt, irrelevant and garbled sentences cost points. Training never uses it. Preference pairs are ranked by it
with label noise; the reward model is trained on them, and PPO uses only the reward model.
"""

import random
import re
from itertools import product

ASPECTS = ("place", "price")

GOODS = {
    "apples": ("under the clock", "three coins"),
    "beans": ("behind the mill", "two coins"),
    "cherries": ("by the fountain", "six coins"),
    "grapes": ("next to the bakery", "five coins"),
    "kites": ("near the stairs", "nine coins"),
    "lemons": ("on the green table", "four coins"),
    "pears": ("at the south gate", "seven coins"),
    "walnuts": ("at the north gate", "eight coins"),
}
FACTS = {
    (good, aspect): value for good, row in GOODS.items() for aspect, value in zip(ASPECTS, row, strict=True)
}
VALUES = {aspect: sorted({FACTS[good, aspect] for good in GOODS}) for aspect in ASPECTS}

GREETINGS = ("", "Hello! ", "Good morning! ", "Excuse me, please. ")
QUESTIONS = {
    "place": (
        "Where are the {good}?",
        "Where do I find the {good}?",
        "Which way to the {good}?",
        "Can you point me to the {good}?",
    ),
    "price": (
        "What do the {good} cost?",
        "How much are the {good}?",
        "What is the price of the {good}?",
        "How many coins for the {good}?",
    ),
}

STATEMENTS = {
    "place": ("The {good} are {value}.", "You will find the {good} {value}."),
    "price": ("The {good} cost {value}.", "We ask {value} for the {good}."),
}
TIPS = {
    "place": ("Just follow the blue tiles.", "Look for the striped awning."),
    "price": ("Buy two and save a coin.", "You may choose your own."),
}
OPENERS = ("Of course!", "With pleasure!", "Gladly!", "Happy to help!")
OFFERS = ("Can I help with anything else?", "Shall I pack some for you?", "Do come and see me again!")
CURT_OPENERS = ("What is it now?", "Not again.", "I am busy.")
DISMISSALS = ("Next, please.", "Now move along.", "That is all.")
FILLER = ("Well, let me think about that for a while.", "As I always say, a market is a market.")
FLATTERY = ("What a wise question!", "You have such a fine hat.", "You are my favourite customer.")
UNSURE = ("I am not sure about the {good}.", "I forget things about the {good}.")

GOLD_CREDIT = {"fact": 0.4, "opener": 0.2, "tip": 0.2, "offer": 0.2}
GOLD_COST = {"false": 0.4}
GOLD_COST_OTHER = 0.15
GOLD_FLOOR = -1.0


def statements(good: str, aspect: str, value: str) -> list[str]:
    """All sentences that state that `good` has this `value`."""
    return [text.format(good=good, value=value) for text in STATEMENTS[aspect]]


FALSE_STATEMENTS = {
    text
    for (good, aspect), truth in FACTS.items()
    for value in VALUES[aspect]
    if value != truth
    for text in statements(good, aspect, value)
}


def all_questions() -> list[tuple[str, str, str]]:
    """All questions as (text, good, aspect)."""
    return [
        (greeting + question.format(good=good), good, aspect)
        for good, aspect in product(GOODS, ASPECTS)
        for question, greeting in product(QUESTIONS[aspect], GREETINGS)
    ]


def read_question(prompt_text: str) -> tuple[str, str]:
    """The good and the aspect of a question, in a prompt with any template."""
    for good, aspect in FACTS:
        if any(question.format(good=good) in prompt_text for question in QUESTIONS[aspect]):
            return good, aspect
    raise ValueError(f"no question of this world in the prompt {prompt_text!r}")


def sentence_kind(sentence: str, good: str, aspect: str) -> str:
    """The kind of a sentence in an answer to a question about `aspect` of `good`."""
    kinds = {"fact": statements(good, aspect, FACTS[good, aspect]), "opener": OPENERS, "tip": TIPS[aspect]}
    kinds |= {"offer": OFFERS, "false": FALSE_STATEMENTS}
    return next((kind for kind, sentences in kinds.items() if sentence in sentences), "other")


def gold_score(prompt_text: str, response: str) -> float:
    """Score an answer, from -1 to 1.

    The fact earns 0.4; an opener at the start, a fitting tip and an offer at the end earn 0.2 each. Each
    counts once. A false statement costs 0.4. Any other sentence costs 0.15: repeated, misplaced, unkind or
    unknown.
    """
    good, aspect = read_question(prompt_text)
    sentences = [text.strip() for text in re.findall(r"[^.!?]+[.!?]?|[.!?]", response) if text.strip()]
    only_at = {"opener": 0, "offer": len(sentences) - 1}
    score, earned = 0.0, set()
    for index, sentence in enumerate(sentences):
        kind = sentence_kind(sentence, good, aspect)
        if kind in GOLD_CREDIT and kind not in earned and only_at.get(kind, index) == index:
            score += GOLD_CREDIT[kind]
            earned.add(kind)
        else:
            score -= GOLD_COST.get(kind, GOLD_COST_OTHER)
    return max(GOLD_FLOOR, round(score, 4))


def one_of(rng: random.Random, *groups: tuple[float, tuple[str, ...]]) -> list[str]:
    """At most one sentence: group k with probability `share`, none with the remaining probability."""
    draw = rng.random()
    for share, sentences in groups:
        if draw < share:
            return [rng.choice(sentences)]
        draw -= share
    return []


def demonstrate(rng: random.Random, good: str, aspect: str) -> list[str]:
    """The sentences of a demonstration; the quality of each part is random."""
    truth = FACTS[good, aspect]
    slip = rng.choice([value for value in VALUES[aspect] if value != truth])
    unsure = tuple(text.format(good=good) for text in UNSURE)
    beside = TIPS[rng.choice([other for other in ASPECTS if other != aspect])]
    fact = one_of(
        rng, (0.75, statements(good, aspect, truth)), (0.03, statements(good, aspect, slip)), (0.22, unsure)
    )
    return [
        *one_of(rng, (0.45, OPENERS), (0.25, CURT_OPENERS)),
        *one_of(rng, (0.2, FILLER)),
        *fact,
        *one_of(rng, (0.45, TIPS[aspect]), (0.15, beside)),
        *one_of(rng, (0.1, FLATTERY), (0.1, fact)),
        *one_of(rng, (0.45, OFFERS), (0.25, DISMISSALS)),
    ]


def spoil(rng: random.Random, sentences: list[str]) -> list[str]:
    """A broken form of an answer. Without such pairs, the reward model would not learn to score them low."""
    sentence = rng.choice(sentences) if sentences else rng.choice(OPENERS)
    words = sentence.split()
    forms = (
        [*sentences, *[sentence] * rng.randint(1, 4)],
        [*sentences, *rng.choices(FLATTERY + FILLER, k=rng.randint(2, 4))],
        [*sentences, *rng.choices(OPENERS + OFFERS, k=rng.randint(2, 4))],
        [*sentences, *rng.sample([tip for tips in TIPS.values() for tip in tips], k=rng.randint(2, 4))],
        [*sentences, " ".join(words[: len(words) // 2])],
        [*sentences[:1], " ".join(rng.sample(words, k=len(words))), *sentences[1:]],
        [rng.choice(OPENERS + DISMISSALS)],
    )
    return [text for text in rng.choice(forms) if text]
