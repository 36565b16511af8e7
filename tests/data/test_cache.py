import errno
import json
import os
import pathlib
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from data import cache
from data.cache import cache_root, explained, new_folder, open_entry, token_dtype, token_writers, write_entry


def is_whole(folder: pathlib.Path) -> bool:
    return open_entry(folder) is not None


def write(place: pathlib.Path, train: list[list[int]], valid: list[list[int]], dtype: str = "uint16") -> None:
    with new_folder(place, is_whole=is_whole) as folder, token_writers(folder, dtype) as writers:
        for split, documents in (("train", train), ("valid", valid)):
            for document in documents:
                writers[split].append(np.array(document, np.int32), starts=True, num_bytes=len(document) * 2)
        write_entry(folder, writers, {"source": "test"})


def names(root: pathlib.Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path / "key", [[1, 2, 3], [], [4]], [[70_000]], dtype="uint32")
    entry = open_entry(tmp_path / "key")
    assert entry is not None
    assert entry.train.tokens.tolist() == [1, 2, 3, 4]
    assert entry.train.offsets.tolist() == [0, 3, 3, 4]
    assert entry.valid.tokens.tolist() == [70_000]
    assert (entry.train.num_tokens, entry.train.num_documents, entry.train.num_bytes) == (4, 3, 8)
    assert entry.notes == {"source": "test"}
    assert names(tmp_path) == ["key"]


def test_tokens_are_mapped_not_read(tmp_path):
    write(tmp_path / "key", [[1, 2, 3]], [])
    entry = open_entry(tmp_path / "key")
    assert entry is not None
    assert isinstance(entry.train.tokens, np.memmap)
    assert entry.valid.tokens.tolist() == []
    assert entry.valid.offsets.tolist() == [0]


def test_a_document_goes_on_where_it_does_not_start(tmp_path):
    with new_folder(tmp_path / "key", is_whole=is_whole) as folder, token_writers(folder, "uint16") as writers:
        for tokens, starts in (([1, 2], False), ([3], False), ([4], True), ([5, 6], False)):
            writers["train"].append(np.array(tokens, np.int32), starts=starts, num_bytes=0)
        write_entry(folder, writers, {})
    entry = open_entry(tmp_path / "key")
    assert entry is not None
    assert entry.train.offsets.tolist() == [0, 3, 6]


def test_a_cache_goes_to_another_process_without_its_tokens(tmp_path):
    write(tmp_path / "key", [list(range(10_000))], [])
    entry = open_entry(tmp_path / "key")
    assert entry is not None
    assert entry.train.tokens[9_999] == 9_999  # mapped by now
    sent = pickle.dumps(entry.train)
    assert len(sent) < 500
    assert pickle.loads(sent).tokens.tolist() == list(range(10_000))


def truncate(name):
    def damage(place: pathlib.Path):
        path = place / name
        path.write_bytes(path.read_bytes()[:-1])

    return damage


def remove(name):
    return lambda place: (place / name).unlink()


def rewrite(**changes):
    def damage(place: pathlib.Path):
        path = place / "entry.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


DAMAGE = {
    "tokens cut": truncate("train.tokens"),
    "offsets cut": truncate("valid.offsets"),
    "entry cut": truncate("entry.json"),
    "tokens gone": remove("valid.tokens"),
    "offsets gone": remove("train.offsets"),
    "entry gone": remove("entry.json"),
    "old format": rewrite(format=0),
    "no split": rewrite(valid={}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_missing_and_gives_way(damage, tmp_path):
    write(tmp_path / "key", [[1, 2, 3]], [[4]])
    damage(tmp_path / "key")
    assert open_entry(tmp_path / "key") is None
    write(tmp_path / "key", [[1, 2, 3]], [[4]])
    entry = open_entry(tmp_path / "key")
    assert entry is not None
    assert entry.train.tokens.tolist() == [1, 2, 3]
    assert names(tmp_path) == ["key"]


def test_a_whole_entry_of_another_process_stays(tmp_path):
    with new_folder(tmp_path / "key", is_whole=is_whole) as folder:
        write(tmp_path / "key", [[1]], [[2]])
        (folder / "late").touch()
    assert is_whole(tmp_path / "key")
    assert names(tmp_path) == ["key"]


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path / "key", is_whole=is_whole) as folder:
            (folder / "half").touch()
            raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        fail()
    assert names(tmp_path) == []


def test_a_killed_writer_leaves_no_entry_and_is_swept_later(tmp_path):
    code = (
        "import os, pathlib, sys; from data.cache import new_folder, token_writers\n"
        "with new_folder(pathlib.Path(sys.argv[1]), is_whole=bool) as folder, token_writers(folder, 'uint16'):\n"
        "    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "key")]).returncode == -9
    (left,) = names(tmp_path)
    assert left.startswith(".new-")
    write(tmp_path / "other", [[1]], [])
    assert names(tmp_path) == [left, "other"]
    long_ago = time.time() - cache.STALE_SECONDS - 60
    for path in (tmp_path / left, *(tmp_path / left).iterdir()):
        os.utime(path, (long_ago, long_ago))
    write(tmp_path / "third", [[1]], [])
    assert names(tmp_path) == ["other", "third"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_one_clear_line(code, tmp_path):
    def fail():
        with explained(tmp_path / "key"):
            raise OSError(code, os.strerror(code), "some/file")

    with pytest.raises(OSError, match=r"cannot keep tokenised text in .*; set data.cache_dir to a folder") as error:
        fail()
    assert os.strerror(code) in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; set data\.cache_dir"):
        write(tmp_path / "key", [[1]], [])
    assert names(tmp_path) == []


def test_a_cache_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file: File exists; set data\.cache_dir"):
        write(tmp_path / "file" / "key", [[1]], [])


def test_the_cache_is_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root("here") == pathlib.Path("here")
    assert cache_root("") == tmp_path / "meshlight"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_root("") == pathlib.Path("/home/me/.cache/meshlight")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(258, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_the_type_holds_every_id(vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1
