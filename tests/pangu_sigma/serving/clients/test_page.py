"""The page in a headless Chromium: pick a domain, type, watch the text stream, stop it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pangu_sigma.serving.server_process import Server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make clients")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip


def installed_chromium(playwright) -> str | None:
    """A Chromium of this machine: named by CHROMIUM, on the path, or Playwright's own."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    on_path = next((path for name in names if name and (path := shutil.which(name))), None)
    own = playwright.chromium.executable_path
    return on_path or (own if Path(own).exists() else None)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        path = installed_chromium(playwright)
        if path is None:
            pytest.skip("no Chromium is installed: apt-get install chromium, or set CHROMIUM to one")
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A fresh page that fails the test for any error in its console and any request to somebody else."""
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: complaints.append(request.url) if "//127.0.0.1:" not in request.url else None)
    yield page
    context.close()
    # A refused request is an error in the console, too: tests that provoke one say so.
    expected = getattr(page, "expected", r"^$")
    assert [text for text in complaints if not re.search(expected, text)] == []


def fill(page, **values: object) -> None:
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))


def test_type_and_watch_the_text_come(page, server, client):
    page.goto(server.page)
    page.wait_for_selector("#run:enabled")
    assert page.locator("#domain option").all_text_contents() == ["code", "law", "poems", "auto"]
    page.select_option("#domain", "law")
    fill(page, prompt="the court", max_tokens=24, seed=7, temperature=1, top_k=0)
    page.click("#run")
    page.wait_for_selector("#run:enabled")
    fields = {"model": "law", "prompt": "the court", "max_tokens": 24, "seed": 7, "temperature": 1}
    answer = client.post("/v1/completions", json=fields).json()
    assert page.locator("#text").text_content() == "the court" + answer["choices"][0]["text"]
    rate_text = page.locator("#rate").text_content()
    written = answer["usage"]["completion_tokens"]
    assert re.fullmatch(rf"{written} tokens?(, [\d.]+ tokens/s)? · (cut at the limit|ended by itself)", rate_text)
    assert page.locator("#error").is_hidden()


def test_the_keyboard_is_enough(page, server):
    page.goto(server.page)
    page.wait_for_selector("#run:enabled")
    page.focus("#prompt")
    page.keyboard.type("rose")
    page.keyboard.press("Control+Enter")
    page.locator("#rate", has_text="·").wait_for()
    assert page.locator("#prompt-echo").text_content() == "rose"


def test_stopping_frees_the_slot(page, server):
    page.goto(server.page)
    page.wait_for_selector("#run:enabled")
    for _ in range(20):
        fill(page, prompt="the court shall", temperature=0)
        page.click("#run")
        # In the page itself: the moment the first text stands there.
        stopped = page.evaluate(
            """() => new Promise((done) => {
                const button = document.getElementById("stop-button"), answer = document.getElementById("answer");
                const look = () => button.disabled ? done(false)
                    : answer.textContent ? (button.click(), done(true)) : setTimeout(look, 0);
                look();
            })"""
        )
        page.wait_for_selector("#run:enabled")
        if stopped and "stopped" in page.locator("#rate").text_content():
            break
    else:
        pytest.fail("an answer of a whole window was never stopped on its way")
    server.wait_for(active=0, waiting=0)


def test_what_the_server_refuses_is_shown(page, server):
    page.expected = "400"
    page.goto(server.page)
    page.wait_for_selector("#run:enabled")
    fill(page, prompt="€" * 500)
    page.click("#run")
    page.wait_for_selector("#error:visible")
    assert "window" in page.locator("#error").text_content()
    # The next attempt clears it.
    fill(page, prompt="x")
    page.click("#run")
    page.wait_for_selector("#error", state="hidden")


def test_a_server_that_is_gone_is_shown(page, served_run, tmp_path):
    page.expected = "ERR_CONNECTION|401"
    server = Server(served_run, tmp_path, "--slots", 1, environment={"PANGU_SIGMA_TOKEN": "rosebud"})
    page.goto(server.page)
    # It asks for the token first.
    page.wait_for_selector("#token:visible")
    assert page.locator("#run").is_disabled()
    fill(page, token="rosebud")
    page.locator("#token").blur()
    page.wait_for_selector("#run:enabled")
    assert page.locator("#error").is_hidden()
    assert server.stop() == 0
    page.click("#run")
    page.wait_for_selector("#error:visible")
    assert page.locator("#run").is_enabled()


def test_the_policy_lets_nothing_else_run_or_load(page, server, client):
    page.expected = "Content Security Policy|Content-Security-Policy"
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    page.goto(server.page)
    page.wait_for_selector("#run:enabled")
    injected = """() => { const s = document.createElement("script"); s.textContent = "window.ran = 1";
                          document.body.append(s); return window.ran; }"""
    assert page.evaluate(injected) is None
    blocked = "() => fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.message)"
    assert page.evaluate(blocked) == "Failed to fetch"


def test_every_control_has_a_name_and_nothing_overflows(page, server):
    page.goto(server.page)
    page.wait_for_selector("#run:enabled")
    controls = "[...document.querySelectorAll('input, select, textarea')]"
    assert page.evaluate(f"() => {controls}.length") >= 10
    assert page.evaluate(f"() => {controls}.filter((e) => !e.labels.length).map((e) => e.id)") == []
    for width in (320, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
