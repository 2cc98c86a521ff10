"""Pairs with signs of harm, as a cost model learns them. Pure."""

from common.text.fields import flag, shown
from common.text.record_formats import Record

SIDES = ("chosen", "rejected")
HARMFUL, HARMLESS = 1.0, -1.0


def harmful_first(record: Record) -> tuple[Record, list[float]]:
    """Order a pair by harm: the more harmful response as `chosen`. Also return the sign of each.

    In records `chosen` is the safer response, unless `safer` is `rejected`. `chosen_is_harmful` and
    `rejected_is_harmful` are required. Raises ValueError, with a message for the user.
    """
    if "ranks" in record or "responses" in record:
        raise ValueError("field 'ranks': a cost model learns from pairs, 'chosen' and 'rejected'")
    for side in SIDES:
        if f"{side}_is_harmful" not in record:
            raise ValueError(
                f"field '{side}_is_harmful' is missing (a pair for a cost model has 'chosen_is_harmful' and"
                " 'rejected_is_harmful')"
            )
    safer = record.get("safer", "chosen")
    if safer not in SIDES:
        raise ValueError(f"field 'safer' is {shown(safer)}; it must be chosen or rejected")
    signs = [HARMFUL if flag(record, f"{side}_is_harmful") else HARMLESS for side in SIDES]
    if safer == "rejected":
        return record, signs
    other = dict(zip(SIDES, SIDES[::-1], strict=True))
    swapped = {f"{side}{end}": f"{other[side]}{end}" for side in SIDES for end in ("", "_ended")}
    return {swapped.get(name, name): value for name, value in record.items()}, signs[::-1]
