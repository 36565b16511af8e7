"""Pages stand alone, escape what they are given, and pictures are drawn of any map."""

import base64
import json
import re
import struct

import numpy as np
import pytest

from evals import pictures
from evals.attention_maps import AttentionMap
from evals.attention_page import Pair, sections
from evals.page import Picture, Section, Table, page, save
from evals.viewer import viewer


def some_map(title="layer 0", heads=2, queries=("ein", "<b>", "$x$ 字"), keys=("a", "b", "c", "</script>")):
    weights = np.random.default_rng(0).random((heads, len(queries), len(keys)))
    weights /= weights.sum(axis=-1, keepdims=True)
    return AttentionMap(title=title, weights=weights, queries=queries, keys=keys)


def size(png: bytes) -> tuple[int, int]:
    """Width and height that a PNG's header says."""
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


def test_a_page_escapes_and_needs_nothing_from_elsewhere(tmp_path):
    parts = [
        Section("A < B", ("x & y",), Table(("head",), (("<i>",),)), (Picture("one", b"png", '"quoted"'),)),
        Section("more", beside=(Picture("two", b"other", "two"),)),
    ]
    save(tmp_path / "page.html", tmp_path / "pictures", "<title>", "a > b", parts)
    text = (tmp_path / "page.html").read_text()
    assert text == page("<title>", "a > b", parts)
    for escaped in ("&lt;title&gt;", "a &gt; b", "A &lt; B", "x &amp; y", "<td>&lt;i&gt;</td>", "&quot;quoted&quot;"):
        assert escaped in text
    assert base64.b64encode(b"png").decode() in text
    assert base64.b64encode(b"other").decode() not in text
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|https?://', text)
    assert {file.name: file.read_bytes() for file in (tmp_path / "pictures").iterdir()} == {
        "one.png": b"png",
        "two.png": b"other",
    }


def test_the_viewer_holds_the_weights_and_no_label_can_end_its_script():
    map = some_map()
    text = viewer([map], head=1, query=2)
    data = json.loads(re.search(r"const data = (\{.*\}), root", text)[1])
    assert (data["map"], data["head"], data["query"]) == (0, 1, 2)
    (one,) = data["maps"]
    assert (one["heads"], one["queries"], one["keys"][-1]) == (2, ["ein", "<b>", "$x$ 字"], "</script>")
    held = np.frombuffer(base64.b64decode(one["weights"]), np.uint8).reshape(map.weights.shape)
    np.testing.assert_allclose(held / 255, map.weights, atol=0.5 / 255 + 1e-9)
    assert text.count("</script>") == 1


def test_crossing_maps_make_a_page_and_so_do_maps_of_several_texts():
    one, other = some_map(), some_map("second", heads=1, queries=("x",), keys=("u", "v"))
    found = sections([one], Pair("ein", "c", (0,), (2,)), top=1)
    assert [section.heading for section in found] == [
        "Which heads tie “ein” to “c”", "One head at a time", "All heads", "The mean over heads",
    ]  # fmt: skip
    assert found[0].table is not None
    assert len(found[0].table.rows) == len(found[0].pictures) == 1
    assert not found[-1].words  # no sink: a source's first word is a word as others are
    assert [section.heading for section in sections([one, other])] == ["One head at a time", "All heads"]


@pytest.mark.parametrize("draw", [pictures.heat_map, pictures.alignment])
def test_a_large_map_grows_with_its_words(draw):
    small, large = some_map(), some_map(keys=tuple("abcdefghijklmnopqrstuvwxyz"))
    (width, height), (more, same) = (size(pictures.png(draw(map, 0))) for map in (small, large))
    assert more > 1.5 * width
    assert same >= height - 100


def test_small_maps_keep_their_places():
    image = pictures.tiled([[np.full((2, 2), 0.5), None], [np.ones((1, 2)), np.full((2, 1), 0.2)]])
    n = np.nan
    expected = [[0.5, 0.5, n, 0, 0], [0.5, 0.5, n, 0, 0], [n, n, n, n, n], [1, 1, n, 0.2, n], [n, n, n, 0.2, n]]
    np.testing.assert_allclose(image, expected, rtol=1e-6)


def test_bleu_by_length_is_a_picture(tmp_path):
    rows = [(1, 10, 40, 31.5), (11, 20, 1200, 28.0), (21, 60, 7, 12.25)]
    pictures.bleu_by_length(tmp_path / "bleu.png", {"attention": rows, "plain": [(1, 10, 40, 30.0)], "none": []})
    assert size((tmp_path / "bleu.png").read_bytes()) == (912, 528)
