"""The documents hold together: links lead somewhere, and every decision is in the index."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_decision_is_in_the_index():
    index = (ROOT / "docs" / "design" / "README.md").read_text()
    missing = [page.name for page in (ROOT / "docs" / "design").glob("*.md") if f"({page.name})" not in index]
    assert missing == ["README.md"], "add the page to docs/design/README.md, with its sentence"
