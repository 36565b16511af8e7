"""The page is one file: pictures inside, nothing from a network, words escaped."""

import html.parser
import re

import pytest

from configs.planning import Wishes, asked, of_model
from perf import report
from perf.plan import search

ROWS = [{"kind": "train", "measured": 2.0, "predicted": 2.1}]


class Reader(html.parser.HTMLParser):
    """Checks that tags close, and keeps what they hold."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.rows = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page():
    question, check = asked(of_model("llama3_2_1b"), True, Wishes(chip="v5e", chips=16, batches=(64,), length=2048))
    answer = search(question, check)
    return answer, report.page(answer, "a <b> & c", "configs/x.py", report.neighbours(answer, check), ROWS)


def test_the_page_is_whole_and_self_contained(page):
    answer, text = page
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(reader.images) == 5, "timeline, roofline, memory, scaling, measured"
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in reader.images)
    assert reader.rows > len(answer.plans)
    without = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"(src|href)=|https?://|@import|url\(", without)


def test_names_are_escaped_and_the_command_stands_there(page):
    _, text = page
    assert "a &lt;b&gt; &amp; c" in text
    assert "a <b> & c" not in text
    assert "uv run train.py configs/x.py mesh.data=" in text
