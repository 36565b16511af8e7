"""A run's folder: its config, who trains in it, and that nothing of another run is overwritten. Knows no arrays.

runs/<name>/config.json     the resolved config
runs/<name>/tokenizer …     what the model's tokens mean; of pairs also source_tokenizer where there are two,
runs/<name>/test.source …   test.target: the pairs that were kept apart, and
runs/<name>/best/           the parameters of the best evaluation by BLEU
runs/<name>/metrics.jsonl, events/, loss.png, samples.txt
runs/<name>/checkpoints/    see parallel/checkpoint.py
runs/<name>/lock            held by the process that trains; of several by the first, which alone writes here

Several processes see one folder: a checkpoint is of all of them.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import time
from collections.abc import Iterator
from typing import Any

from parallel import hosts

# Where and how fast a run computes, not what: these may change between the parts of a run.
FREE = (
    *("name", "out", "hosts", "mesh", "rules", "execution", "topologies"),
    *("data.workers", "data.prefetch", "data.cache_dir"),
)
SHARED_SECONDS = 30.0  # until what one process wrote must show on every other
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # a disk that takes no more


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Make the folder and keep other processes from training in it.

    Raises ValueError where it is something else or held already, OSError where it cannot be written, now or later.
    """
    lock = _opened(folder) if hosts.is_first() else None
    try:
        if lock is not None:
            _lock(lock, folder)
        _check_shared(folder, lock)
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            f"{error.filename or folder} could not be written: {error.strerror}; the checkpoints are whole: "
            "make room or grant write access, then give the same command again"
        ) from error
    finally:
        if lock is not None:
            os.close(lock)


def _opened(folder: pathlib.Path) -> int:
    """The lock file of the folder, both made where there are none."""
    if folder.exists() and not (folder / "config.json").exists() and any(p.name != "lock" for p in folder.iterdir()):
        raise ValueError(f"{folder} exists and is no run (it has no config.json); give another name=NAME or out=DIR")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(
            f"the run folder {folder} cannot be written: {error.strerror}; grant write access or give another out=DIR"
        ) from error


def _check_shared(folder: pathlib.Path, lock: int | None) -> None:
    """Raise ValueError where this process sees another folder of that name than the first process."""
    if hosts.count() == 1:
        return
    word = secrets.token_hex(16)
    if lock is not None:
        os.pwrite(lock, word.encode(), 0)
        os.fsync(lock)
    word, end = hosts.agreed("folder", word), time.monotonic() + SHARED_SECONDS
    while not (folder / "lock").exists() or (folder / "lock").read_text() != word:
        if time.monotonic() > end:
            raise ValueError(
                f"process {hosts.index()} does not see the run folder {folder} of process 0; "
                "give an out=DIR that all hosts share (NFS, a mounted bucket)"
            )
        time.sleep(0.2)


def check_same(config: dict[str, Any]) -> None:
    """Raise ValueError where this process was started with another config than the first one."""
    changed = differences(hosts.agreed("config", config), json.loads(json.dumps(config)))
    other = [f"{key} is {there} there and {here} here" for key, (there, here) in changed.items() if key[:6] != "hosts."]
    if other:
        raise ValueError(
            f"process {hosts.index()} was started with another config than process 0: {other[0]}"
            f"{f' (and {len(other) - 1} more)' * (len(other) > 1)}; start all with the same, save hosts.index"
        )


def _lock(descriptor: int, folder: pathlib.Path) -> None:
    """The system lets go of it when the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"another process trains in {folder}; wait for it, stop it, or give another name=NAME"
        ) from error


def has_begun(folder: pathlib.Path) -> bool:
    """Whether there is something to lose: a measured step or a checkpoint."""
    metrics = folder / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or any(folder.glob("checkpoints/*"))


def check_config(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Raise ValueError where the run that is there was asked for differently; -> what may differ and does.

    {"mesh.fsdp": (1, 4)}
    """
    if not (folder / "config.json").exists() or not has_begun(folder):
        return {}
    changed = differences(json.loads((folder / "config.json").read_text()), json.loads(json.dumps(config)))
    for size in ("model.vocab_size", "model.source_vocab_size"):
        if changed.get(size, (0, None))[1] == 0:  # "the tokenizer's", which the folder's config has resolved
            changed.pop(size, None)
    free = {key: pair for key, pair in changed.items() if any(f"{key}.".startswith(f"{start}.") for start in FREE)}
    other = [f"{key} is {old} there and {new} here" for key, (old, new) in changed.items() if key not in free]
    if other:
        raise ValueError(
            f"{folder} holds a run with another config: {', '.join(other)}; "
            "give the same values to continue it, name=NAME for a new run, or delete the folder"
        )
    return free


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys on which two JSON values differ.  {"a": {"b": 1}}, {"a": {"b": 2}} -> {"a.b": (1, 2)}"""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return {} if old == new else {path: (old, new)}
    changed = {}
    for key in [*old, *(key for key in new if key not in old)]:
        changed |= differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return changed


def write(path: pathlib.Path, text: str) -> None:
    """Write a whole file or none."""
    part = path.with_name(path.name + ".partial")
    part.write_text(text)
    part.replace(path)
