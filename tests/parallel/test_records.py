import dataclasses
import json
from typing import Literal

import pytest

from parallel.records import checked, describe, difference, from_dict, keys, nearest, require, to_dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    axes: str | tuple[str, ...] | None = None
    limit: int | None = None
    on: bool = True


SAMPLE = Outer(steps=3, inner=Inner(rate=1 / 3, kind="b"), many=(Inner(), Inner(rate=1e-30)), axes=("x", "y"), on=False)


def test_json_round_trip_is_exact():
    assert from_dict(Outer, json.loads(json.dumps(to_dict(SAMPLE)))) == SAMPLE


def test_missing_keys_take_their_default_and_required_ones_are_named():
    assert from_dict(Outer, {"steps": 1}) == Outer(steps=1)
    with pytest.raises(ValueError, match=r"^steps is missing and has no default"):
        from_dict(Outer, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "3"}, "steps='3' must be int"),
        ({"steps": True}, "steps=True must be int"),
        ({"steps": 3.0}, "steps=3.0 must be int"),
        ({"steps": 3, "on": 1}, "on=1 must be true|false"),
        ({"steps": 3, "inner": {"rate": "x"}}, "inner.rate='x' must be number"),
        ({"steps": 3, "inner": {"rate": float("nan")}}, "inner.rate=nan must be number"),
        ({"steps": 3, "inner": {"kind": "c"}}, "inner.kind='c' must be a|b"),
        ({"steps": 3, "inner": {"kinds": "a"}}, "unknown key inner.kinds; did you mean kind?"),
        ({"steps": 3, "inner": 4}, "inner=4 must be a table of rate, kind"),
        ({"steps": 3, "many": [{"rate": None}]}, "many.0.rate=None must be number"),
        ({"steps": 3, "limit": "few"}, "limit='few' must be int|none"),
        ({"steps": 3, "axes": [1]}, "axes=[1] must be text|text,…|none"),
    ],
)
def test_wrong_values_are_named_by_their_dotted_key(values, message):
    with pytest.raises(ValueError) as error:
        from_dict(Outer, values)
    assert str(error.value) == message


def test_keys_are_dotted_and_in_source_order():
    assert [key.path for key in keys(SAMPLE)] == ["steps", "inner.rate", "inner.kind", "many", "axes", "limit", "on"]


def test_difference_names_what_changed():
    other = dataclasses.replace(SAMPLE, steps=4, inner=Inner(rate=1 / 3, kind="a"))
    assert difference(to_dict(SAMPLE), to_dict(other)) == {"steps": (3, 4), "inner.kind": ("b", "a")}
    assert difference(to_dict(SAMPLE), json.loads(json.dumps(to_dict(SAMPLE)))) == {}


def test_difference_shows_a_key_that_only_one_has():
    assert difference({"a": {"b": 1}}, {"c": 2}) == {"a.b": (1, None), "c": (None, 2)}


def test_whole_numbers_become_floats_where_a_float_is_asked():
    assert type(checked(float, 1, "x")) is float


def test_types_are_described_as_a_user_writes_them():
    annotations = [int, float, bool, int | None, Literal["a", "b"], tuple[int, ...], tuple[Literal["a", "b"], ...]]
    assert list(map(describe, annotations)) == ["int", "number", "true|false", "int|none", "a|b", "int,…", "(a|b),…"]


def test_nearest_prefers_the_same_last_name():
    choices = ["train.steps", "train.batch_size", "optim.warmup_steps"]
    assert nearest("steps", choices) == "; did you mean train.steps?"
    assert nearest("optim.steps", choices) == "; did you mean train.steps?"
    assert nearest("train.batchsize", choices) == "; did you mean train.batch_size?"
    assert nearest("qqq", choices) == ""


def test_require_says_the_bounds():
    require(SAMPLE, "outer", "steps", low=3)
    with pytest.raises(ValueError, match=r"^outer.steps=3 must be at least 4$"):
        require(SAMPLE, "outer", "steps", low=4)
    with pytest.raises(ValueError, match=r"^outer.steps=3 must be between 0 and 1$"):
        require(SAMPLE, "outer", "steps", low=0, high=1)
