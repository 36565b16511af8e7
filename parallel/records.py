"""Frozen records as plain data: dotted keys, types, JSON, differences. Knows no record by name, imports no jax."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal

PLAIN = {bool: "true|false", int: "int", float: "number", str: "text", type(None): "none"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One value of a record that a user can set."""

    path: str  # dotted, from the outermost record
    annotation: Any  # its type
    value: Any  # what it is now


def is_record(annotation) -> bool:
    """Whether a type, or the type of a value, is a dataclass."""
    return dataclasses.is_dataclass(annotation)


def keys(record, section: str = "") -> Iterator[Key]:
    """Every value below a record, in the order of its source: `train.steps`, `model.rope_scaling.kind`, …"""
    for name, annotation in typing.get_type_hints(type(record)).items():
        path, value = section + name, getattr(record, name)
        if is_record(value):
            yield from keys(value, path + ".")
        else:
            yield Key(path=path, annotation=annotation, value=value)


def describe(annotation) -> str:
    """A type as a user writes its values: `int`, `number`, `true|false`, `adamw|lion`, `number|none`, `int,…`."""
    args = typing.get_args(annotation)
    if annotation in PLAIN:
        return PLAIN[annotation]
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, args))
    if is_union(annotation):
        return "|".join(map(describe, args))
    if typing.get_origin(annotation) is tuple:
        item = describe(args[0])
        return f"({item}),…" if "|" in item else f"{item},…"
    return f"{annotation.__name__} record"


def is_union(annotation) -> bool:
    """Whether a type is `A | B` or `Optional[A]`."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean …?` with the choice most like the word, or nothing where none is near."""
    choices = list(choices)
    last = word.split(".")[-1]
    same = [choice for choice in choices if choice.split(".")[-1] == last and choice != word]
    near = (
        same
        or difflib.get_close_matches(word, choices, n=1)
        or [choice for choice in choices if difflib.get_close_matches(last, [choice.split(".")[-1]], cutoff=0.75)]
    )
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def to_dict(record) -> Any:
    """A record as what JSON can hold: dictionaries, lists and plain values."""
    if is_record(record):
        return {field.name: to_dict(getattr(record, field.name)) for field in dataclasses.fields(record)}
    return [to_dict(item) for item in record] if isinstance(record, tuple) else record


def from_dict(cls, values: Any, section: str = "") -> Any:
    """The record of type `cls` that `to_dict` made these values from. Every value is checked against its annotation."""
    hints = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        raise ValueError(f"{section.rstrip('.') or cls.__name__}={values!r} must be a table of {', '.join(hints)}")
    for name in values.keys() - hints.keys():
        raise ValueError(f"unknown key {section}{name}{nearest(name, hints)}")
    for field in dataclasses.fields(cls):
        if field.name not in values and dataclasses.MISSING is field.default is field.default_factory:
            raise ValueError(f"{section}{field.name} is missing and has no default; give it a value")
    return cls(**{name: checked(hints[name], value, section + name) for name, value in values.items()})


def checked(annotation, value, path: str) -> Any:
    """The value as its annotation has it (lists become tuples, whole numbers floats), or ValueError."""
    args = typing.get_args(annotation)
    if is_record(annotation):
        return from_dict(annotation, value, path + ".")
    if typing.get_origin(annotation) is tuple and isinstance(value, list | tuple):
        return tuple(checked(args[0], item, f"{path}.{index}") for index, item in enumerate(value))
    if is_union(annotation):
        records = [arm for arm in args if is_record(arm)]
        if records and isinstance(value, dict):  # the record that has the most of these names
            return from_dict(
                max(records, key=lambda arm: len(value.keys() & typing.get_type_hints(arm))), value, path + "."
            )
        for arm in args:
            try:
                return checked(arm, value, path)
            except ValueError:
                continue
    if typing.get_origin(annotation) is Literal and any(value == arg and type(value) is type(arg) for arg in args):
        return value
    if annotation is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is annotation and annotation is not float:
        return value
    raise ValueError(f"{path}={value!r} must be {describe(annotation)}")


def difference(old: dict, new: dict) -> dict[str, tuple[Any, Any]]:
    """Dotted keys on which two `to_dict` values differ, with both values (None where absent).

    {"seed": 0, "train": {"steps": 100}}, {"seed": 0, "train": {"steps": 200}}  ->  {"train.steps": (100, 200)}
    """
    was, now = flatten(old), flatten(new)
    return {path: (was.get(path), now.get(path)) for path in {**was, **now} if was.get(path) != now.get(path)}


def flatten(values: dict, section: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{section}{name}.") if isinstance(value, dict) else {section + name: value}
    return flat


def require(record, section: str, names: str, *, low: int | float, high: int | float = math.inf) -> None:
    """Raise ValueError where one of the record's named values lies outside low…high."""
    for name in names.split():
        value = getattr(record, name)
        if not isinstance(value, int | float):
            raise ValueError(f"{section}.{name}={value!r} must be a number")
        if not low <= value <= high:
            bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"{section}.{name}={value} must be {bound}")
