"""The page in a real browser, where one is installed: no errors, and nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium installed")

PROBE = """<script>
const width = document.documentElement.clientWidth;
const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width + 1);
const shown = c => [...document.querySelectorAll("svg." + c)].filter(e => e.getBoundingClientRect().width > 0).length;
parent.postMessage({
  width, scroll: document.documentElement.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 200)),
  figures: [shown("wide"), shown("narrow")], background: getComputedStyle(document.body).backgroundColor,
}, "*");
</script>"""
# A frame, because the browser's own window does not get as narrow as a phone.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><script>
addEventListener("message", e => document.documentElement.dataset.probe = JSON.stringify(e.data));
</script><iframe src="probed.html" style="border: 0; width: %dpx; height: 900px"></iframe>"""


def look(page, tmp_path, width, *flags):
    """Opens a copy of the page with a probe in it; returns what the probe saw and the browser's console messages."""
    html = page.read_text(encoding="utf-8")
    (tmp_path / "probed.html").write_text(html.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % width, encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000", *flags,
        "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    probe = re.search(r'data-probe="([^"]*)"', done.stdout)[1]
    return json.loads(unescape(probe)), re.findall(".*CONSOLE.*", done.stderr)


@pytest.fixture(params=["typical", "nasty"])
def page(request):
    return request.getfixturevalue(f"{request.param}_page")


def test_fits_a_phone_without_errors(page, tmp_path):
    seen, messages = look(page, tmp_path, 390)
    assert messages == []
    assert seen["width"] == 390
    assert seen["scroll"] == 390
    assert seen["wide"] == []
    wide, narrow = seen["figures"]
    assert wide == 0
    assert narrow >= 9


def test_shows_the_wide_figures_on_a_desk_and_follows_the_dark_setting(page, tmp_path):
    seen, messages = look(page, tmp_path, 1200, "--blink-settings=preferredColorScheme=0")
    assert messages == []
    assert seen["wide"] == []
    wide, narrow = seen["figures"]
    assert wide >= 9
    assert narrow == 0
    assert seen["background"] == "rgb(20, 24, 28)"
