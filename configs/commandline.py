"""`[CONFIG] [dotted.key=value …]` to a RunConfig. Every refusal is a ValueError of one line; imports no jax."""

import difflib
import os
import pathlib
import re
import runpy
import traceback
import typing
from collections.abc import Iterator, Sequence

from configs.base import RunConfig
from configs.overrides import override
from parallel.records import from_dict, is_record, nearest, to_dict


def resolve(arguments: Sequence[str], default: pathlib.Path) -> RunConfig:
    """The run that a command line asks for: at most one config file (else `default`), then overrides in any order."""
    for argument in arguments:
        if argument.startswith("-"):
            bare = argument.lstrip("-")
            raise ValueError(
                f"unknown option {argument}; settings are written key=value{f', as {bare}' * ('=' in bare)}"
            )
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise ValueError(f"one config file makes a run, not {len(files)}: {' '.join(files)}; settings are key=value")
    run = load(pathlib.Path(files[0]) if files else default)
    return override(run, [argument for argument in arguments if "=" in argument])


def load(path: pathlib.Path) -> RunConfig:
    """The `run` of a config file, its values checked against their annotations."""
    if not path.is_file():
        folder = pathlib.Path(__file__).parent
        known = {file.stem: os.path.relpath(file) for file in sorted(folder.glob("*.py"))}
        near = difflib.get_close_matches(path.stem, known, n=1)
        hint = f"; did you mean {known[near[0]]}?" if near else f"; there are some in {os.path.relpath(folder)}"
        raise ValueError(f"{path} is no config file (a .py file with run = RunConfig(...)){hint}")
    try:
        run = runpy.run_path(str(path)).get("run")
    except Exception as error:
        raise ValueError(f"{place(error, path)}: {explain(error)}") from error
    if not isinstance(run, RunConfig):
        raise ValueError(f"{path} has no run = RunConfig(...); see configs/quickstart.py")
    try:
        return from_dict(RunConfig, to_dict(run))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def place(error: Exception, path: pathlib.Path) -> str:
    """The config file and, where known, its line at which the error arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f"{path}, line {line}" if line else str(path)


def explain(error: Exception) -> str:
    """The error in one line, with the nearest field for a keyword that a record does not have."""
    unknown = re.fullmatch(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'.*", str(error))
    if not unknown:
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    name, keyword = unknown.groups()
    fields = {record.__name__: list(typing.get_type_hints(record)) for record in records_in(RunConfig)}
    return f"{name} has no field {keyword}{nearest(keyword, fields.get(name, []))}"


def records_in(annotation) -> Iterator[type]:
    """The record types that a type mentions, itself first: RunConfig, ModelConfig, RopeScaling, …"""
    if is_record(annotation):
        yield annotation
        for inner in typing.get_type_hints(annotation).values():
            yield from records_in(inner)
    for arm in typing.get_args(annotation):
        yield from records_in(arm)
