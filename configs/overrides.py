"""`dotted.key=value` on a record: typed, checked, refused with the nearest right name. Knows no command line."""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from parallel.records import Key, checked, describe, is_record, keys, nearest


def override(record, settings: Sequence[str]) -> Any:
    """The record with every `key=value` set, all at once: values that depend on each other can change together.

    override(run, ["mesh.tensor=2", "optim.peak_lr=1e-3"])  ->  RunConfig(mesh=MeshConfig(tensor=2, …), …)
    """
    known = {key.path: key for key in keys(record)}
    values = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} is not key=value; write e.g. train.steps=100")
        if setting == "mesh=auto":
            path, text = "mesh.auto", "true"
        if path in values:
            raise ValueError(f"{path} is set twice; say it once")
        values[path] = parse(find(path, known), text)
    return rebuild(record, values, "")


def find(path: str, known: dict[str, Key]) -> Key:
    """The key of that path, or ValueError with the nearest one."""
    if path in known:
        return known[path]
    inside = [other for other in known if other.startswith(path + ".")]
    if inside:
        raise ValueError(f"{path} is a section, not a value; set one of {', '.join(inside)}")
    raise ValueError(f"unknown key {path} (--help lists all){nearest(path, known)}")


def parse(key: Key, text: str) -> Any:
    """What a user wrote for a key as a value of the key's type: the first reading of the text that fits."""
    args = typing.get_args(key.annotation)
    if any(is_record(arg) for arg in args):
        raise ValueError(f"{key.path} holds records; set it in a config file, not on the command line")
    for reading in readings(text):
        with contextlib.suppress(ValueError):
            return checked(key.annotation, reading, key.path)
    choices = [arg for arg in args if isinstance(arg, str)]
    raise ValueError(f"{key.path}={text} must be {describe(key.annotation)}{nearest(text, choices)}")


def readings(text: str) -> Iterator[Any]:
    """Everything the text could mean, the most particular first: "1,2" is [1, 2], [1.0, 2.0], ["1", "2"] or itself."""
    items = [item.strip() for item in text.split(",")]
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        yield words[text.lower()]
    for kind in (int, float, str):
        with contextlib.suppress(ValueError):
            yield kind(text) if len(items) == 1 else [kind(item) for item in items]
    yield text
    yield items if text else []


def rebuild(record, values: dict[str, Any], section: str) -> Any:
    """A copy of the record, innermost first, with the values whose dotted path lies in it."""
    changes = {}
    for field in dataclasses.fields(record):
        path, value = section + field.name, getattr(record, field.name)
        if path in values:
            changes[field.name] = values[path]
        elif is_record(value):
            changes[field.name] = rebuild(value, values, path + ".")
    return dataclasses.replace(record, **changes)
