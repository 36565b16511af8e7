"""python -m evals end to end on a tiny model, and what it refuses."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from data.tokenizer import ByteTokenizer
from evals.__main__ import main
from model import huggingface
from parallel import compilation
from tests.inference.small import LLAMA, parameters

ROOT = pathlib.Path(__file__).parents[2]
TINY = dataclasses.replace(LLAMA, vocab_size=320, num_layers=1, num_heads=2, num_kv_heads=1)


@pytest.fixture(autouse=True)
def _keep_no_programs(monkeypatch):
    monkeypatch.setattr(compilation, "cache_compilations", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face folder with a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("model")
    huggingface.save(path, TINY, parameters(TINY), dtype="float32")
    ByteTokenizer().save(path)
    return path


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_attention_writes_a_page_and_pictures_and_ranks_heads(capsys, folder, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = call(
        capsys, "attention", folder, "a cat, it", "--out", page, "--from", "it", "--to", "cat", "--top", "1"
    )
    assert (status, err) == (0, f"written to {page}, pictures to {tmp_path / 'page_pictures'}\n")
    head, row = out.splitlines()
    assert head.split()[:3] == ["map", "head", "weight"]
    assert row.split()[:2] == ["layer", "0"]
    assert "Which heads tie “it” to “cat”" in page.read_text()
    names = sorted(file.stem for file in (tmp_path / "page_pictures").iterdir())
    assert names == ["map_0", "mean", "mean_without_first", "overview", "tie_1"]


def test_refusals_are_one_line(capsys, folder, tmp_path):
    page = tmp_path / "page.html"
    for words, message in [
        (("attention", tmp_path / "no", "x", "--out", page), "is nothing that exists"),
        (("attention", folder, "x" * 64, "--out", page), "the text is 65 tokens long but maps of more than 64"),
        (("attention", folder, "a cat", "--out", tmp_path / "no" / "p.html"), "which is no folder; make it first"),
        (("attention", folder, "a cat", "--out", tmp_path), "is a folder; give the page a name in it"),
        (("attention", folder, "a cat", "--out", page, "--from", "cat"), "--from and --to belong together"),
        (("attention", folder, "a cat", "--out", page, "--from", "cat", "--to", "dog"), "its words are: a, cat"),
        (("attention", folder, "a cat", "--out", page, "--from", "a", "--to", "cat"), "a decoder looks back only"),
        (("attention", folder, "a cat", "--out", page, "--top", "0"), "--top 0 must be at least 1"),
        (("attention", folder, "a cat"), "--out"),
        (("attentoin",), "attention"),
    ]:
        status, out, err = call(capsys, *words)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
    assert not list(tmp_path.iterdir())


def test_help_answers_without_jax():
    code = "import sys\nfrom evals.__main__ import _parser\n_parser().format_help()\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_smollm2_ties_it_to_the_animal(capsys, tmp_path):
    text = "The animal didn't cross the street because it was too tired"
    status, out, _ = call(
        capsys, "attention", "smollm2", text, "--out", tmp_path / "page.html", "--from", "it", "--to", "animal"
    )
    assert status == 0
    assert out.splitlines()[1].split()[:4] == ["layer", "13", "8", "75.0%"]
