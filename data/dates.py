"""Pairs of a date as people write it and the same date in ISO 8601, generated. Knows no files and no tokens.

Every text has one reading. Slashes are month/day/year, or year/month/day where the year comes first; dots are
day.month.year; a year of two digits is 1950 to 2049 and stands last, after a named month.
"""

import datetime
import random
from collections.abc import Sequence
from typing import NamedTuple

FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
NUM_DAYS = (LAST - FIRST).days + 1
MOST_HELD_OUT = NUM_DAYS // 2  # days; the rest is trained on
MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july"),
    *("august", "september", "october", "november", "december"),
)
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
FORMS = (
    "{weekday}, {month} {day} {year}",
    "{Weekday}, {Month} {day}, {year}",
    "{Wkd} {day} {Mon} {year}",
    "{day} {month} {year}",
    "{day} {Month} {year}",
    "{day} {Mon} {yy}",
    "{dd}-{Mon}-{yy}",
    "{Mon} {day}, {year}",
    "{Month} {nth}, {year}",
    "the {nth} of {month} {year}",
    "{weekday} the {nth} of {Mon} {year}",
    "{mm}/{dd}/{year}",
    "{year}/{mm}/{dd}",
    "{day}.{number}.{year}",
    "{dd}.{mm}.{year}",
)


class DatePairs(NamedTuple):
    """Texts and their ISO dates; no date of one part is in another."""

    train: list[tuple[str, str]]
    valid: list[tuple[str, str]]
    test: list[tuple[str, str]]


def write_date(day: datetime.date, form: str) -> str:
    """A date in one of FORMS.

    >>> write_date(datetime.date(2019, 3, 5), "the {nth} of {month} {year}")
    the 5th of march 2019
    """
    month, weekday = MONTHS[day.month - 1], WEEKDAYS[day.weekday()]
    return form.format(
        **{"weekday": weekday, "Weekday": weekday.title(), "Wkd": weekday[:3].title()},
        **{"month": month, "Month": month.title(), "Mon": month[:3].title()},
        **{"number": day.month, "mm": f"{day.month:02}"},
        **{"day": day.day, "dd": f"{day.day:02}", "nth": f"{day.day}{_ordinal(day.day)}"},
        **{"year": day.year, "yy": f"{day.year % 100:02}"},
    )


def _ordinal(number: int) -> str:
    is_teen = 10 < number % 100 < 14
    return "th" if is_teen else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def make_dates(num_examples: int, *, num_valid: int, num_test: int, seed: int) -> DatePairs:
    """Pairs of which so many are held out; each held-out pair has a date of its own.

    >>> make_dates(3, num_valid=1, num_test=0, seed=0)
    train [("the 21st of may 1987", "1987-05-21"), ("8.11.2033", "2033-11-08")], valid [("Mar 5, 2019", "2019-03-05")]
    """
    num_held = num_valid + num_test
    if num_held >= num_examples:
        raise ValueError(
            f"data.valid_pairs={num_valid} and data.test_pairs={num_test} leave nothing of "
            f"data.examples={num_examples} to train on; raise data.examples"
        )
    if num_held > MOST_HELD_OUT:
        raise ValueError(
            f"data.valid_pairs={num_valid} and data.test_pairs={num_test} need {num_held} dates of their own, "
            f"more than {MOST_HELD_OUT}, half of all; lower one of them"
        )
    rng = random.Random(seed)
    days = [FIRST + datetime.timedelta(number) for number in range(NUM_DAYS)]
    rng.shuffle(days)
    held, seen = days[:num_held], days[num_held:]
    train = [rng.choice(seen) for _ in range(num_examples - num_held)]
    return DatePairs(*(_write(part, rng) for part in (train, held[:num_valid], held[num_valid:])))


def _write(days: Sequence[datetime.date], rng: random.Random) -> list[tuple[str, str]]:
    return [(write_date(day, rng.choice(FORMS)), day.isoformat()) for day in days]
