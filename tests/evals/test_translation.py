"""BLEU is sacreBLEU's, on plain text; files that do not belong together are refused."""

import gzip
import json
import re

import pytest
from sacrebleu import corpus_bleu

from evals.__main__ import main
from evals.translation import Bucket, bleu, by_length, judged, report

REFERENCES = ["Two young men are outside near many bushes .", "A little girl climbs into a wooden playhouse."]
HYPOTHESES = ["Two young men are outside by many bushes.", "A small girl climbs into a wooden house."]


def test_bleu_is_the_papers():
    """A translation that is the reference has 100; 3 words for 4 cost exp(1 - 4/3) (Papineni et al. 2002)."""
    assert bleu(REFERENCES, REFERENCES) == pytest.approx(100)
    assert bleu(HYPOTHESES, REFERENCES) == pytest.approx(corpus_bleu(HYPOTHESES, [REFERENCES]).score)
    assert 30 < bleu(HYPOTHESES, REFERENCES) < 60
    short = judged(["the cat sat"], ["the cat sat down"])
    assert short.brevity == pytest.approx(2.718281828 ** (1 - 4 / 3))
    assert short.length_ratio == pytest.approx(0.75)
    assert short.bleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.")
    assert short.chrf_signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0")
    assert bleu([""], ["the cat"]) == 0


def test_a_model_of_lower_case_is_judged_in_lower_case():
    lowered = [text.lower() for text in REFERENCES]
    assert judged(lowered, REFERENCES).bleu < 100
    same = judged(lowered, REFERENCES, lower=True)
    assert (same.bleu, same.chrf) == (pytest.approx(100), pytest.approx(100))
    assert "case:lc" in same.bleu_signature


def test_long_sources_are_judged_apart_from_short_ones():
    sources = ["w " * n for n in (1, 10, 11, 15, 20, 99)]
    references = ["a b c d e"] * 6
    found = by_length(sources, ["a b c d e"] * 4 + ["x"] * 2, references)
    assert found == [
        Bucket("1–10", 1, 10, 2, pytest.approx(100)),
        Bucket("11–15", 11, 15, 2, pytest.approx(100)),
        Bucket("16–20", 16, 20, 1, 0.0),
        Bucket("21–", 21, 99, 1, 0.0),
    ]
    assert by_length(["w"], ["a"], ["a"])[3] == Bucket("21–", 21, 1, 0, None)
    lines = report(judged(references, references), [*found[:1], Bucket("21–", 21, 99, 0, None)])
    assert lines[0].startswith("BLEU     100.0   nrefs:1")
    assert lines[-2:] == ["1–10              2  100.0", "21–               0      –"]


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="there are 1 translations and 2 references"):
        judged(["a"], REFERENCES)
    with pytest.raises(ValueError, match="0 translations to judge"):
        judged([], [])


@pytest.fixture
def run(tmp_path):
    """A run folder as far as it is looked at before jax is imported."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": {"kind": "attention"}}))
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text(json.dumps({"model": {"embed_dim": 8}}))
    (tmp_path / "two").write_text("a\nb\n")
    (tmp_path / "three.gz").write_bytes(gzip.compress(b"a\nb\nc\n"))
    (tmp_path / "none").write_text("")
    (tmp_path / "binary").write_bytes(b"a\nb\xff\n")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "source", "reference", "more", "message"),
    [
        ("run", "two", "three.gz", [], "two has 2 lines and .*three.gz has 3"),
        ("run", "four", "two", [], "--source .*four is no file"),
        ("run", "none", "none", [], "none has 0 lines"),
        ("run", "binary", "two", [], "binary line 2 is not UTF-8: byte 2 is 0xFF"),
        ("decoder", "two", "two", [], "decoder is decoder-only, which continues a text: use infer.py generate"),
        ("run", "two", "two", ["--out", "nowhere/file"], "--out nowhere/file is in nowhere, which is no folder"),
        ("run", "two", "two", ["--beam", "11"], "beams=11 must be between 1 and 10"),
        ("run", "two", "two", ["--beam", "1", "--length-penalty", "2"], "--length-penalty is for a search"),
    ],
)
def test_the_command_line_refuses_in_one_line(capsys, run, model, source, reference, more, message):
    files = ["--source", str(run / source), "--reference", str(run / reference)]
    assert main(["translation", str(run / model), *files, *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert re.search(message, err)
