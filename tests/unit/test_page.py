"""The inspector's page in a real browser: what it shows, and that it can be used with the keyboard alone."""

import base64
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest
from PIL import Image

from vllm_lvspec.observe.inspect import write_page

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="chromium and chromedriver are not installed (Debian: chromium, chromium-driver)",
)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1000,1400",
)  # fmt: skip
ARROW_RIGHT, ARROW_LEFT, END, TAB = "\ue014", "\ue012", "\ue010", "\ue004"
LOOSE = (196, 229, 246)  # 35 % of #56b4e9 on white


class Browser:
    """As much of the WebDriver protocol as is needed here."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        options = {"goog:chromeOptions": {"args": list(QUIET), "binary": shutil.which("chromium")}}
        found = self._send("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.url += f"/session/{found['sessionId']}"

    def _send(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, path):
        self._send("POST", "/url", {"url": path.as_uri()})

    def run(self, script):
        return self._send("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, *keys):
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._send("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def screenshot(self):
        return Image.open(io.BytesIO(base64.b64decode(self._send("GET", "/screenshot")))).convert("RGB")

    def errors(self):
        return [entry for entry in self._send("POST", "/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def close(self):
        self._send("DELETE", "")


@pytest.fixture(scope="module")
def browser():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                started = Browser(port)
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline and driver.poll() is None
                time.sleep(0.2)
        yield started
        started.close()
    finally:
        driver.terminate()
        driver.wait()


@pytest.fixture
def page(tmp_path):
    """Six tokens about a video of two times of 2 x 3 visual tokens, two of which the drafter sees."""
    video = tmp_path / "video.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"mp4v"), 8, (96, 64))
    for i in range(8):
        writer.write(np.full((64, 96, 3), (0, 0, 255) if i < 4 else (0, 255, 0), np.uint8))
    writer.release()
    words = [("A ", "exact"), ("small ", "loose"), ("red ", "shift"), ("<b>ball</b>", "exact"), (" falls", "target"),
             ("<|im_end|>", "target")]  # fmt: skip
    tokens = [
        {"token_id": i, "text": text, "reason": reason, "step": i // 3, "target_id": 90 if reason == "loose" else i,
         "target_text": "tiny " if reason == "loose" else text, "draft_id": 70 if i == 4 else i,
         "draft_text": " rises" if i == 4 else text, "relevance": None if i == 5 else 0.125 * i,
         "is_anchor": i in (2, 4), "closest": [[i, 0.5], [i + 6, 0.25]] if i < 5 else []}
        for i, (text, reason) in enumerate(words)
    ]  # fmt: skip
    item = {"kind": "video", "grid": [2, 2, 3], "num_tokens": 12}
    choice = {"request_id": "r", "policy": "lvspec", "relaxation": 0.9, "kept": [0, 7], "num_steps": 2,
              "is_finished": True, "items": [item], "tokens": tokens}  # fmt: skip
    path = tmp_path / "page.html"
    write_page(path, {"model": "m", "prompt": "What happens?", "choices": [choice]}, video)
    return path


def shown(browser):
    """The marked token, what is said of it, and which visual tokens are marked."""
    return browser.run(
        "return [document.querySelector('.token.shown')?.textContent, document.querySelector('.detail').innerText,"
        " [...document.querySelectorAll('.cell')].flatMap((c, i) => c.classList.contains('matched') ? [i] : [])]"
    )


def test_tokens_are_reached_with_the_keyboard_and_say_what_they_are(browser, page):
    browser.open(page)
    assert browser.run("return document.querySelector('.answer').innerText") == (
        "A small red <b>ball</b> falls<|im_end|>"
    )
    assert browser.run("return document.querySelectorAll('.cell.hidden').length") == 10
    browser.press(TAB)
    assert shown(browser)[0] == "A " and shown(browser)[2] == [0, 6]
    browser.press(ARROW_RIGHT)
    token, detail, matched = shown(browser)
    assert token == "small " and matched == [1, 7]
    assert "video 1, time 1 of 2, row 1, column 2, hidden from the drafter (cosine 0.50)" in detail
    assert "video 1, time 2 of 2, row 1, column 2 (cosine 0.25)" in detail
    hatched = "[...document.querySelectorAll('.cell.matched')].map(c => getComputedStyle(c).backgroundImage != 'none')"
    assert browser.run(f"return {hatched}") == [True, False]  # a mark does not hide what the drafter does not see
    assert "The target would have said tiny" in detail and "0.125, a filler" in detail and "loose" in detail
    browser.press(END, ARROW_LEFT)
    token, detail, matched = shown(browser)
    assert token == " falls" and matched == [4, 10]
    assert "Drafted, and refused:  rises" in detail and "an anchor" in detail
    assert browser.run("return document.activeElement.textContent") == " falls"
    assert not browser.errors()


def test_the_screenshot_shows_reasons_frames_and_marks(browser, page):
    browser.open(page)
    browser.press(TAB)
    picture = np.asarray(browser.screenshot()).astype(int)

    def area(colour, tolerance=12):
        return (np.abs(picture - colour).max(-1) <= tolerance).sum()

    assert area(LOOSE) > 300  # behind the loose word and in the legend
    assert area((255, 0, 0), 60) > 1000 and area((0, 255, 0), 60) > 1000  # both times of the video
    assert area((213, 94, 0)) > 200  # around what the token is most like, and under the target's own words
    assert np.isclose(picture[5, 5], 255).all()
    wide = browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert wide
