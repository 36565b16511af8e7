"""Pairs of a text and its translation, out of files: which belong together and what is held out. Knows no tokens."""

import gzip
import json
import pathlib
import zlib
from typing import Any, NamedTuple

import numpy as np

from data.config import PairsConfig
from data.dates import make_dates

Pair = tuple[str, str]
FORMS = "dates, a folder with train.SOURCE and train.TARGET, SOURCE_FILE,TARGET_FILE, a .tsv or a .jsonl"
VALID_NAMES = ("val", "valid", "dev")  # of a folder's held-out files, the first that is there
SHOWN = 60  # characters of a line that an error shows
UTF8_MARK = b"\xef\xbb\xbf"  # some editors begin a file with it


class PairTexts(NamedTuple):
    """All pairs of a run, and how many were dropped."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]
    num_empty: int  # one side was blank
    num_repeats: int  # were to be trained on, but are held out as well

    def report(self) -> str:
        """What became of the pairs, in a few words."""
        return (
            f"{len(self.train):,} pairs train, {len(self.valid):,} validate, {len(self.test):,} kept apart for test; "
            f"{self.num_empty + self.num_repeats:,} dropped: {self.num_empty:,} with an empty side, "
            f"{self.num_repeats:,} repeat a held-out pair"
        )


def read_pairs(config: PairsConfig) -> PairTexts:
    """Every pair of a run, the same at each call; ValueError or OSError where something is no parallel text."""
    if config.path == "dates":
        dates = make_dates(config.examples, num_valid=config.valid_pairs, num_test=config.test_pairs, seed=0)
        texts = PairTexts(dates.train, dates.valid, dates.test, num_empty=0, num_repeats=0)
    else:
        texts = _read_files(config)
    if not config.lower:
        return texts
    return texts._replace(**{part: _lowered(getattr(texts, part)) for part in ("train", "valid", "test")})


def _lowered(pairs: list[Pair]) -> list[Pair]:
    return [(source.lower(), target.lower()) for source, target in pairs]


def _read_files(config: PairsConfig) -> PairTexts:
    raw_train, raw_valid = _read_train(config), _read_valid(config)
    train, valid = _filled(raw_train), _filled(raw_valid or [])
    if not train:
        raise ValueError(f"data.path={config.path} holds no pair: {len(raw_train)} lines, none with text on both sides")
    if len(train) > 1 and all(source == target for source, target in train):
        raise ValueError(
            f"data.path={config.path} has the same text on both sides of all {len(train)} pairs; "
            "give the source language and its translation"
        )
    num_empty = len(raw_train) - len(train) + len(raw_valid or []) - len(valid)
    new_valid, test = _hold_out(train, 0 if valid else config.valid_pairs, config.test_pairs)
    held = {*new_valid, *test}
    seen = [pair for pair in train if pair not in held]
    return PairTexts(seen, valid or new_valid, test, num_empty, len(train) - len(seen) - len(held))


def _filled(pairs: list[Pair]) -> list[Pair]:
    """Pairs with text on both sides, without the blanks around it."""
    stripped = ((source.strip(), target.strip()) for source, target in pairs)
    return [pair for pair in stripped if all(pair)]


def _hold_out(pairs: list[Pair], num_valid: int, num_test: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to validate and to test with, all different, drawn alike for every run."""
    distinct = list(dict.fromkeys(pairs))
    if num_valid + num_test >= len(distinct):
        raise ValueError(
            f"data.valid_pairs={num_valid} and data.test_pairs={num_test} leave nothing to train on of "
            f"{len(distinct)} different pairs; lower them"
        )
    drawn = np.random.default_rng(0).permutation(len(distinct))[: num_valid + num_test].tolist()
    return [distinct[at] for at in drawn[:num_valid]], [distinct[at] for at in drawn[num_valid:]]


def _read_train(config: PairsConfig) -> list[Pair]:
    path = pathlib.Path(config.path)
    if path.is_dir():
        return _read_two(*(_file_of(path, "train", language) for language in (config.source, config.target)))
    if path.is_file():
        return _read_one(path, config)
    files = [pathlib.Path(name.strip()) for name in config.path.split(",")]
    missing = [file for file in files if not file.is_file()]
    if len(files) != 2 or len(missing) == 2:
        raise ValueError(f"data.path={config.path} does not exist; give {FORMS}")
    if missing:
        there = _names_in(missing[0].parent)
        raise ValueError(f"data.path={config.path}: there is no file {missing[0]}; {missing[0].parent} has {there}")
    return _read_two(*files)


def _read_valid(config: PairsConfig) -> list[Pair] | None:
    """Pairs that a folder has for validation; None where there are none."""
    path = pathlib.Path(config.path)
    for stem in VALID_NAMES:
        found = [_find(path, stem, language) for language in (config.source, config.target)]
        if path.is_dir() and any(found):
            return _read_two(*(_file_of(path, stem, language) for language in (config.source, config.target)))
    return None


def _find(folder: pathlib.Path, stem: str, language: str) -> pathlib.Path | None:
    plain = folder / f"{stem}.{language}"
    return next((file for file in (plain, folder / f"{plain.name}.gz") if file.is_file()), None)


def _file_of(folder: pathlib.Path, stem: str, language: str) -> pathlib.Path:
    found = _find(folder, stem, language)
    if found is None:
        raise ValueError(
            f"folder {folder} has no {stem}.{language} or {stem}.{language}.gz, it has {_names_in(folder)}; "
            "set data.source and data.target to its file endings"
        )
    return found


def _names_in(folder: pathlib.Path) -> str:
    """The first files of a folder, for an error."""
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    return ", ".join([*names[:8], *(["…"] if len(names) > 8 else [])]) or "no file"


def _read_two(source: pathlib.Path, target: pathlib.Path) -> list[Pair]:
    """Line n of one file translates line n of the other."""
    if source.samefile(target):
        raise ValueError(f"{source} is both source and target; give the file of each language")
    sources, targets = read_lines(source), read_lines(target)
    if len(sources) != len(targets):
        first = " | ".join(repr(lines[0][:SHOWN]) if lines else "nothing" for lines in (sources, targets))
        raise ValueError(
            f"{source} has {len(sources)} lines and {target} has {len(targets)}; line n of one must translate line n "
            f"of the other (line 1: {first})"
        )
    return list(zip(sources, targets, strict=True))


def _read_one(path: pathlib.Path, config: PairsConfig) -> list[Pair]:
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "tsv":
            return [_columns(line, path, number) for number, line in enumerate(read_lines(path), start=1)]
        case "jsonl":
            lines = ((number, line) for number, line in enumerate(read_lines(path), start=1) if line.strip())
            return [_values(line, (config.source, config.target), path, number) for number, line in lines]
    raise ValueError(f"data.path={config.path} is one file and neither .tsv nor .jsonl; give {FORMS}")


def _columns(line: str, path: pathlib.Path, number: int) -> Pair:
    columns = line.split("\t")
    if len(columns) != 2:
        raise ValueError(
            f"{path} line {number} has {len(columns) - 1} tabs, not 1: {line[:SHOWN]!r}; each line is source TAB target"
        )
    return columns[0], columns[1]


def _values(line: str, languages: Pair, path: pathlib.Path, number: int) -> Pair:
    """What one line of a .jsonl holds under both keys."""
    try:
        entries: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} line {number} is not JSON: {error}; each line holds one object") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} line {number} holds {type(entries).__name__}; each line holds one object")
    for language in languages:
        if language not in entries:
            raise ValueError(
                f"{path} line {number} has no key {language!r}, it has {', '.join(sorted(entries)) or 'none'}; "
                "set data.source and data.target"
            )
        if not isinstance(entries[language], str):
            kind = type(entries[language]).__name__
            raise ValueError(f"{path} line {number} holds {kind} under {language!r} instead of text; correct the line")
        if any("\ud800" <= character <= "\udfff" for character in entries[language]):
            raise ValueError(f"{path} line {number} holds half a surrogate pair under {language!r}, which no text has")
    return entries[languages[0]], entries[languages[1]]


def read_lines(path: pathlib.Path) -> list[str]:
    """Lines of a plain or .gz file without their ends; a line ends at a line feed alone."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}; fetch or compress it again") from None
    content = content.removeprefix(UTF8_MARK)
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        column = len(before) - before.rfind(b"\n")
        raise ValueError(
            f"{path} line {before.count(10) + 1} is not UTF-8: byte {column} is 0x{content[error.start]:02X}; "
            "convert the file to UTF-8"
        ) from None
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
