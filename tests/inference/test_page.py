"""The web page in a real browser: what a person clicks does what it says."""

import contextlib
import pathlib
import shutil

import pytest

from tests.inference.fake_engine import FakeEngine
from tests.inference.serving import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; uv sync")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")


@contextlib.contextmanager
def page_of(server, **context):
    """The page in a browser; whatever goes wrong in it fails the test."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(**context)
        wrong, asked = [], []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        try:
            yield page
            assert not wrong
            assert all(url.startswith(server.url) for url in asked)
        finally:
            browser.close()


def say(page, text):
    page.get_by_label("Your message").last.fill(text)
    page.get_by_role("button", name="Send").click()


def test_a_conversation_streams_and_can_be_stopped():
    engine = FakeEngine(pace=0.01, max_length=100_000)
    with serving(engine) as server, page_of(server) as page:
        expect = sync_api.expect
        expect(page.locator("#model")).to_have_text("tiny")
        expect(page.locator("#state")).to_have_text("ready")
        say(page, "<b>Hi</b>")
        answer = page.locator(".turn.assistant").first
        expect(answer).to_have_text("user\n<b>Hi</b>")  # text, whatever it looks like
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        page.locator("#max_tokens").fill("50000")
        page.locator("#temperature").fill("1.5")
        page.locator("#seed").fill("7")
        page.get_by_role("button", name="New").click()
        expect(page.locator(".turn")).to_have_count(0)
        say(page, "x" * 3000)
        expect(page.locator(".turn.assistant")).to_contain_text("xxx")
        expect(page.locator("#running")).to_have_text("1")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        expect(page.locator("#running")).to_have_text("0")
        asked = engine.requests[-1]
        assert (asked.max_tokens, asked.sampling.temperature, asked.sampling.seed) == (50000, 1.5, 7)
        assert engine.num_cancelled == 1
        assert server.service.num_open == 0


def test_the_engine_is_shown_as_it_works():
    engine = FakeEngine(pace=0.01, max_length=100_000)
    with serving(engine) as server, page_of(server) as page:
        expect = sync_api.expect
        page.locator("#max_tokens").fill("200")
        say(page, "a" * 300)
        expect(page.locator("#state")).to_have_text("working")
        expect(page.locator("#rate")).not_to_have_text("0")
        expect(page.locator("#used")).to_have_text("1 used")
        expect(page.locator("#free")).to_have_text("60 free")
        expect(page.locator("#generated")).to_have_text("200", timeout=20_000)
        pixel = "document.querySelector('#blocks').getContext('2d').getImageData(2, 2, 1, 1).data[3]"
        assert page.evaluate(pixel) == 255


def test_a_refusal_is_shown_and_a_key_helps():
    with serving(FakeEngine(), keys=("secret",)) as server, page_of(server) as page:
        expect = sync_api.expect
        say(page, "Hi")
        expect(page.locator(".turn.wrong")).to_contain_text("an API key is needed")
        page.get_by_text("System and key").click()
        page.locator("#key").fill("secret")
        page.locator("#system").fill("Be kind")
        say(page, "Ho")
        expect(page.locator(".turn.assistant")).to_contain_text("system\nBe kind")


def test_the_page_can_be_used_by_keyboard_and_on_a_phone(tmp_path):
    small = {"viewport": {"width": 380, "height": 700}, "color_scheme": "dark"}
    with serving(FakeEngine()) as server, page_of(server, **small) as page:
        page.keyboard.type("Hi")  # the message has the focus
        page.keyboard.press("Enter")
        sync_api.expect(page.locator(".turn.assistant")).to_have_text("user\nHi")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 24)"
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input,textarea,button')]"
            ".filter(e => !(e.labels?.length || e.ariaLabel || e.textContent)).length"
        )
        assert unnamed == 0
        page.screenshot(path=pathlib.Path(tmp_path) / "page.png")
