"""Checkpoints: any sharded pytree and a JSON note, written in the background, whole or not at all. Knows no model.

    checkpoints/00000200/arrays/        the tree's arrays, written by Orbax
    checkpoints/00000200/manifest.json  size and checksum of every file, shape of every array, the note; written last

A folder is written as `00000200.partial` and renamed when it is whole. Whoever reads one checks every byte first.
Several processes write and check together (parallel/hosts.py), each its part, in a folder that all of them see.
Orbax is imported where it is needed: it costs a second that the first step should not wait for.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from parallel import hosts

FORMAT = 1  # of the manifest
MANIFEST = "manifest.json"
BLOCK = 2**22  # bytes read at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, every byte of it checked."""

    path: pathlib.Path
    step: int
    note: dict[str, Any]  # what was saved beside the arrays
    shapes: dict[str, tuple[int, ...]]  # of every array: {"parameters.embedding.tokens": (64, 32), …}


class Checkpoints:
    """The writer of one folder of checkpoints. One writer a folder; it cleans up what a killed one left behind."""

    def __init__(self, folder: pathlib.Path, *, keep: int):
        self.folder, self.keep = folder, keep
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None
        if hosts.is_first():
            for pattern in ("*.partial", "*.old"):
                for path in folder.glob(pattern):
                    shutil.rmtree(path)

    def save(self, step: int, tree: Any, note: dict[str, Any]) -> None:
        """Start to write; returns when `tree` may be donated. Raises OSError where this or the last one failed."""
        self.wait()
        arrays, path = named(tree), self.folder / f"{step:08d}"
        partial = path.with_suffix(".partial")
        with plain_errors(path):
            if hosts.is_first():
                check_room(self.folder, sum(array.nbytes for array in arrays.values()))
                partial.mkdir(parents=True)
            ocp = _orbax()
            _writer().save((partial / "arrays").absolute(), args=ocp.args.PyTreeSave(arrays))
        shapes = {name: array.shape for name, array in arrays.items()}
        self._pending = self._thread.submit(self._commit, path, {"step": step, "note": note, "shapes": shapes})

    def wait(self) -> None:
        """Return when the last save is on disk; raise OSError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _commit(self, path: pathlib.Path, about: dict[str, Any]) -> None:
        """Wait for every process's arrays, write the manifest, rename: from then on the checkpoint exists."""
        partial, old = path.with_suffix(".partial"), path.with_suffix(".old")
        with plain_errors(path):
            _writer().wait_until_finished()
            files = fingerprints(partial)
            if not hosts.is_first():
                return
            write_manifest(partial, {**about, "files": files})
            if path.exists():
                path.rename(old)
            partial.rename(path)
            _sync(self.folder)
        self._prune(path)

    def _prune(self, newest_path: pathlib.Path) -> None:
        """Remove all but `keep` checkpoints up to the newest one; a removal that is cut short leaves no half one."""
        earlier = [path for path in written(self.folder) if path.name <= newest_path.name]
        for path in earlier[: -self.keep]:
            path.rename(path.with_suffix(".old"))
        for path in self.folder.glob("*.old"):
            shutil.rmtree(path)


def newest(folder: pathlib.Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none at all. Each damaged one is reported in one line.

    All processes ask together, each reads its part of the files, and all get the same answer. Raises ValueError where
    all are damaged.
    """
    paths = [folder / name for name in hosts.agreed("checkpoints", [path.name for path in written(folder)])]
    for path in reversed(paths):
        found, problem = None, None
        try:
            found = verified(path, part=(hosts.index(), hosts.count()))
        except (ValueError, OSError) as error:
            problem = str(error)
        problem = hosts.first_problem("checkpoint", problem)
        if problem is None:
            return found
        report(f"checkpoint {path} is damaged ({problem}); taking the one before it")
    if paths:
        raise ValueError(
            f"none of the {len(paths)} checkpoints in {folder} is whole; "
            "put a good copy back, or delete the folder above it to start from the beginning"
        )
    return None


def load(checkpoint: Checkpoint, abstract: Any) -> Any:
    """The arrays of a checkpoint in the structure, types and shardings of `abstract` (jax.ShapeDtypeStruct leaves).

    `abstract` may be a part of what was saved, and on other devices: `{"parameters": …}` leaves the optimizer on disk.
    """
    wanted = named(abstract)
    for name, leaf in wanted.items():
        if checkpoint.shapes.get(name) != leaf.shape:
            found = f"has shape {checkpoint.shapes[name]}" if name in checkpoint.shapes else "is missing"
            raise ValueError(
                f"{name} {found} in checkpoint {checkpoint.path} but the model asked for needs {leaf.shape}; "
                "use the config that the checkpoint was trained with"
            )
    ocp = _orbax()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
        for name, leaf in wanted.items()
    }
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
    arrays = _writer().restore((checkpoint.path / "arrays").absolute(), args=args)
    return unnamed(arrays, abstract)


def written(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every checkpoint in a folder, oldest first, damaged ones included."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"\d{8,}", path.name))


def named(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path; random keys as their numbers.  {"a": {"b": x}, "k": key} -> {"a.b": x, "k": key_data}"""
    flat = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = _key_data(leaf)
        flat[jax.tree_util.keystr(path, simple=True, separator=".")] = leaf
    return flat


def unnamed(arrays: dict[str, Any], like: Any) -> Any:
    """The tree that `named` took apart, in the structure of `like`."""

    def leaf(path, like):
        array = arrays[jax.tree_util.keystr(path, simple=True, separator=".")]
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            array = jax.random.wrap_key_data(array)
        assert array.dtype == like.dtype, f"{path} was restored as {array.dtype}, not {like.dtype}"
        return array

    return jax.tree.map_with_path(leaf, like)


def _key_data(leaf: Any) -> Any:
    """A random key, or its shape, as plain numbers."""
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    plain = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=leaf.sharding)


def fingerprints(folder: pathlib.Path) -> dict[str, list]:
    """Size and checksum of every file below `folder`, for process 0; each process reads and pushes to disk its part."""
    hosts.barrier("arrays")  # from here on every process's files are there, by their last names
    paths = _files(folder)[hosts.index() :: hosts.count()]
    mine = {str(path.relative_to(folder)): _fingerprint(path, push=True) for path in paths}
    files: dict[str, list] = {}

    def join(parts: list[dict[str, list]]) -> None:
        for part in parts:
            files.update(part)

    hosts.combined("fingerprints", mine, join)
    return files


def write_manifest(folder: pathlib.Path, about: dict[str, Any]) -> None:
    """Write what `folder` holds into it and push all names to the disk."""
    text = json.dumps({"format": FORMAT, **about})
    with open(folder / MANIFEST, "w") as file:
        file.write(f"{text}\n{zlib.crc32(text.encode()):08x}\n")
        file.flush()
        os.fsync(file.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync(path)


def verified(path: pathlib.Path, part: tuple[int, int] = (0, 1)) -> Checkpoint:
    """The checkpoint at `path`; ValueError or OSError names the first file that is not as it was written.

    `part` (2, 4) reads but the third of four parts of its files.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    text, _, check = (path / MANIFEST).read_text(errors="replace").partition("\n")
    if check != f"{zlib.crc32(text.encode()):08x}\n":
        raise ValueError(f"{MANIFEST} differs from its checksum")
    about = json.loads(text)
    if about["format"] != FORMAT:
        raise ValueError(f"{MANIFEST} has format {about['format']}, this version reads {FORMAT}")
    start, stride = part
    for name, (size, checksum) in list(about["files"].items())[start::stride]:
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if (path / name).stat().st_size != size:
            raise ValueError(f"{name} has {(path / name).stat().st_size} bytes, not {size}")
        if _fingerprint(path / name) != [size, checksum]:
            raise ValueError(f"{name} differs from its checksum")
    shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
    return Checkpoint(path=path, step=about["step"], note=about["note"], shapes=shapes)


def check_room(folder: pathlib.Path, needed: int) -> None:
    """Raise OSError where the disk has less room than the arrays take: better said before than found out halfway."""
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        raise OSError(f"the disk has {free / 2**20:.1f} MiB free and the arrays take {needed / 2**20:.1f} MiB")


def existing(path: pathlib.Path) -> pathlib.Path:
    """The path, or its first parent that exists."""
    return path if path.exists() else existing(path.parent)


@contextlib.contextmanager
def plain_errors(path: pathlib.Path) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is written becomes one line. Orbax raises ValueError for a full disk."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = re.sub(r".*Failed to write \d+ bytes to file \d+: (.*?) \[os_error.*", r"\1", reason, flags=re.DOTALL)
        raise OSError(
            f"checkpoint {path} was not written: {reason}; the checkpoints before it are whole: "
            "make room or grant write access, then give the same command again"
        ) from error


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: pathlib.Path, push: bool = False) -> list:
    """[bytes, checksum] of a file; `push` has the system write it to the disk, too."""
    size, checksum = 0, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
        if push:
            os.fsync(file.fileno())
    return [size, f"{checksum:08x}"]


def _sync(folder: pathlib.Path) -> None:
    """Push a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _orbax():
    """Orbax, quiet: what fails is raised, and one line of ours says it."""
    import logging

    import orbax.checkpoint

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return orbax.checkpoint


@functools.cache
def _writer():
    """One Orbax checkpointer a process. No compression: float bits hardly shrink, and the step wants the cores."""
    ocp = _orbax()
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def prepare() -> None:
    """Import what the first save needs; for a thread with nothing else to do."""
    _writer()
