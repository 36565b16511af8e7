import datetime
import re

import pytest

from data.dates import FIRST, FORMS, LAST, MONTHS, NUM_DAYS, make_dates, write_date

DAYS = [FIRST + datetime.timedelta(number) for number in range(NUM_DAYS)]


def test_a_date_in_every_form():
    assert [write_date(datetime.date(2019, 3, 5), form) for form in FORMS] == [
        "tuesday, march 5 2019",
        "Tuesday, March 5, 2019",
        "Tue 5 Mar 2019",
        "5 march 2019",
        "5 March 2019",
        "5 Mar 19",
        "05-Mar-19",
        "Mar 5, 2019",
        "March 5th, 2019",
        "the 5th of march 2019",
        "tuesday the 5th of Mar 2019",
        "03/05/2019",
        "2019/03/05",
        "5.3.2019",
        "05.03.2019",
    ]


def test_ordinals():
    nths = [write_date(datetime.date(2019, 1, day), "{nth}") for day in range(1, 32)]
    assert [nth for nth in nths if not nth.endswith("th")] == ["1st", "2nd", "3rd", "21st", "22nd", "23rd", "31st"]


def read_date(text: str) -> datetime.date:
    """The module's rules read back, from the text alone."""
    numbers = re.findall(r"\d+", text)
    named = re.search("|".join(month[:3] for month in MONTHS), re.sub(r"[a-z]*day,?", "", text.lower()))
    if named:
        month = [name[:3] for name in MONTHS].index(named.group()) + 1
        day, year = numbers
    elif "." in text:
        day, month, year = numbers
    elif len(numbers[0]) == 4:
        year, month, day = numbers
    else:
        month, day, year = numbers
    century = 0 if len(year) == 4 else 1900 if int(year) >= 50 else 2000
    return datetime.date(century + int(year), int(month), int(day))


@pytest.mark.parametrize("form", FORMS)
def test_every_text_has_one_reading(form):
    texts = [write_date(day, form) for day in DAYS[:: 1 if "yy" in form else 7]]
    assert [read_date(text) for text in texts] == DAYS[:: 1 if "yy" in form else 7]


def test_every_text_fits_into_32_characters_with_its_end():
    assert max(len(write_date(day, form)) for day in DAYS[::5] for form in FORMS) < 32


def test_held_out_dates_are_never_trained_on():
    dates = make_dates(3000, num_valid=300, num_test=200, seed=1)
    assert [len(part) for part in dates] == [2500, 300, 200]
    days = [{iso for _, iso in part} for part in dates]
    assert (len(days[1]), len(days[2])) == (300, 200)
    assert not days[0] & days[1]
    assert not days[0] & days[2]
    assert not days[1] & days[2]
    for text, iso in [pair for part in dates for pair in part]:
        assert read_date(text).isoformat() == iso
        assert FIRST <= datetime.date.fromisoformat(iso) <= LAST


def test_the_seed_decides_the_pairs():
    first, again, other = (make_dates(50, num_valid=5, num_test=5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match=r"valid_pairs=6 and data.test_pairs=4 leave nothing of data.examples=10 "):
        make_dates(10, num_valid=6, num_test=4, seed=0)


def test_more_held_out_dates_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"need 18263 dates of their own, more than 18262, half of all"):
        make_dates(50_000, num_valid=18_000, num_test=263, seed=0)
