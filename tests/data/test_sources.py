import gzip
import json
import os
import sys

import pytest

from data import sources
from data.config import SourceConfig
from data.sources import Document, list_files, read_documents, stat_fingerprint, total_bytes


def read(path, **settings) -> list[Document]:
    return list(read_documents(SourceConfig(path=str(path), **settings)))


def texts(path, **settings) -> list[str]:
    return [document.text for document in read(path, **settings)]


def test_the_standard_library_is_real_text():
    files = list_files(SourceConfig())
    assert files == list_files(SourceConfig())
    assert {"argparse.py", "dataclasses.py"} <= {file.name for file in files}
    assert not any("test" in file.parts or "site-packages" in file.parts for file in files)
    assert (total_bytes(SourceConfig()) or 0) > 10_000_000
    first = next(read_documents(SourceConfig()))
    assert first.starts
    assert first.ends


def test_a_text_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\r\ntwo é\n", newline="")
    assert texts(tmp_path / "a.txt") == ["one\r\ntwo é\n"]


def test_a_folder_is_read_in_order_without_what_is_hidden(tmp_path):
    for name in ("b.txt", "sub/a.md", "a/z.txt", ".hidden", ".git/config", "c.jsonl", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "json"}' if name == "c.jsonl" else "" if "empty" in name else name)
    assert texts(tmp_path) == ["b.txt", "json", "a/z.txt", "sub/a.md"]


def test_jsonl_has_a_document_a_line(tmp_path):
    lines = [json.dumps({"body": "one"}), "", json.dumps({"body": None}), json.dumps({"body": "zwö", "id": 2})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    assert texts(tmp_path / "a.jsonl", field="body") == ["one", "", "zwö"]
    assert texts(tmp_path / "b.jsonl.gz", field="body") == ["one", "", "zwö"]


@pytest.mark.parametrize(
    "text",
    ["line é\n" * 20, "é" * 101, "🤗" * 50, "x" * 64, "a\n" + "🤗" * 40 + "\n\nb", "\n" * 50],
    ids=["lines", "two bytes", "four bytes", "exact", "mixed", "blank"],
)
@pytest.mark.parametrize("size", [8, 16, 33, 1000])
def test_a_long_text_comes_in_parts(text, size, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", size)
    (tmp_path / "long.txt").write_text(text)
    parts = read(tmp_path / "long.txt")
    assert "".join(part.text for part in parts) == text
    assert [part.starts for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    if "\n" in text[:5]:
        assert all(part.text.endswith("\n") for part in parts[:-1] if "\n" in part.text)


def write(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty; data.path needs text"),
        ("a.txt", b"abc\xff\xfe", "a.txt is not text: byte 0xFF at offset 3 is not UTF-8; convert the file to UTF-8"),
        ("a.txt", b"ab\0\xff", "a.txt is not text: byte 0x00 at offset 2 is binary"),
        ("a.txt", "grün".encode("latin-1"), "byte 0xFC at offset 2 is not UTF-8"),
        ("a.txt", "cut é".encode()[:-1], "byte 0xC3 at offset 4 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', r"a.jsonl line 1 has no field 'text', it has \['body'\]; set data.field"),
        ("a.jsonl", b"[1]\n", "a.jsonl line 1 has no field 'text', it has list"),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl:1 holds int under 'text' instead of text"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "a.jsonl:1 holds half a surrogate pair at character 1"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 50, mtime=0)[:-12], "a.jsonl.gz is not a whole gzip file"),
    ],
)
def test_what_is_not_text_is_refused(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


def test_the_offset_counts_from_the_start_of_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 8)
    with pytest.raises(ValueError, match="byte 0x00 at offset 23 is binary"):
        read(write(tmp_path / "a.txt", b"1234567\n1234567\n1234567\0"))


def test_a_binary_file_in_a_folder_is_named(tmp_path):
    write(tmp_path / "a.txt", b"fine")
    write(tmp_path / "b.png", b"\x89PNG")
    with pytest.raises(ValueError, match=r"b.png is not text: byte 0x89 at offset 0"):
        read(tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; give stdlib, a text file or folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no file"):
        read(tmp_path / "empty")


@pytest.mark.parametrize(
    ("path", "library"), [("a.parquet", "pyarrow"), ("hf:some/set", "datasets")], ids=["parquet", "hub"]
)
def test_a_missing_library_is_named_with_its_group(path, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    path = path if path.startswith("hf:") else write(tmp_path / path, b"PAR1")
    with pytest.raises(ValueError, match=f"needs .*{library}.*which is not installed; .* `uv sync --group hub`"):
        read(path)


def test_a_column_of_parquet_holds_the_texts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "zwö"], "id": [1, 2, 3]}), file)
    assert texts(file, field="body") == ["one", "", "zwö"]
    with pytest.raises(ValueError, match=r"has no column 'text', it has \['body', 'id'\]; set data.field"):
        read(file)
    with pytest.raises(ValueError, match="holds int under 'id' instead of text"):
        read(file, field="id")
    write(file, file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is not a whole parquet file"):
        read(file, field="body")


class Rows(list):
    column_names = ("body",)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library that knows one data set."""

    class Datasets:
        @staticmethod
        def load_dataset(name, *, split):
            if name != "some/set":
                raise ConnectionError("no route\nto anywhere")
            return Rows([{"body": f"{split} one"}, {"body": None}])

    monkeypatch.setitem(sys.modules, "datasets", Datasets)


def test_a_data_set_of_the_hub_is_read(hub):
    assert texts("hf:some/set", field="body", split="valid") == ["valid one", ""]
    with pytest.raises(ValueError, match="hf:some/set has no column 'text', it has"):
        read("hf:some/set")


def test_a_data_set_that_does_not_come_is_one_clear_line(hub):
    with pytest.raises(ValueError, match=r"data set 'no/set', split 'train', did not come .*\(no route\); fetch it"):
        read("hf:no/set")


def test_the_stat_fingerprint_sees_every_touch(tmp_path):
    source = SourceConfig(path=str(tmp_path))
    file = write(tmp_path / "a.txt", b"one")
    seen = [stat_fingerprint(source)]
    assert stat_fingerprint(source) == seen[0]
    file.write_bytes(b"three")
    seen.append(stat_fingerprint(source))
    os.utime(file, ns=(1, 1))
    seen.append(stat_fingerprint(source))
    file.rename(tmp_path / "b.txt")
    seen.append(stat_fingerprint(source))
    write(tmp_path / "c.txt", b"")
    seen.append(stat_fingerprint(source))
    seen.append(stat_fingerprint(SourceConfig(path=str(tmp_path), field="body")))
    assert len(set(seen)) == len(seen)


def test_a_hub_name_is_its_fingerprint(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    prints = [stat_fingerprint(SourceConfig(path=path, split=split)) for path in ("hf:a", "hf:b") for split in "xy"]
    assert len(set(prints)) == 4
