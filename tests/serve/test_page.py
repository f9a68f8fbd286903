"""The page in a real browser, where one is installed: it asks, streams the answer and shows who answered."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from importlib.resources import files

import httpx
import pytest
from tiny_models import make_tiny_tokenizer
from tuner.helpers import adapt
from tuner.rows import BY_ID

from headwater.compose import PooledModel
from headwater.evaluation.generate import decode
from headwater.serve import PoolRoutes, RunRoutes

from .engines import alone, sharp_llama
from .servers import thread
from .test_engine import Named, random_adapters

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium installed")

TOKENIZER = make_tiny_tokenizer()
PROBE = """<script>
const until = async condition => { while (!condition()) await new Promise(r => setTimeout(r, 20)); };
const shares = () => [...$("shares").rows].map(r => [r.cells[0].textContent, r.cells[2].textContent]);
addEventListener("load", async () => {
  await until(() => $("model").options.length);
  for (const [id, value] of Object.entries(%s)) $(id)[typeof value === "boolean" ? "checked" : "value"] = value;
  $("form").requestSubmit();
  await until(() => !$("send").disabled);
  const spans = [...$("answer").querySelectorAll("span")], over = [$("title").textContent, shares()];
  if (spans[0] && spans[0].onclick) spans[0].click();
  const width = document.documentElement.clientWidth;
  const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width + 1);
  fetch("seen", {method: "POST", body: JSON.stringify({
    names: [...$("model").options].map(o => o.value), answer: $("answer").textContent, status: $("status").textContent,
    heads: spans.map(s => +s.dataset.head || 0), over, one: [$("title").textContent, shares()],
    width, scroll: document.documentElement.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 100)),
  })});
});
</script>"""
# A frame, because the browser's own window does not get as narrow as a phone. The image, which comes once the probe is
# through, keeps the browser waiting until then.
FRAME = """<!doctype html><link rel="icon" href="data:,"><style>body { margin: 0 }</style><img hidden src="wait">
<iframe src="probed" style="border: 0; width: %dpx; height: 1000px"></iframe>"""


class Probed:
    """The application with three more pages: its own with the probe in it, a frame round that, what the probe saw."""

    def __init__(self, app, width, fields):
        self.app, self.seen = app, None
        page = files("headwater.serve").joinpath("page.html").read_text(encoding="utf-8")
        page = page.replace('id="key"', f'id="key" value="{fields.get("key", "")}"')
        probed = page.replace("</body>", PROBE % json.dumps(fields) + "</body>")
        self.pages = {"/probed": probed, "/frame": FRAME % width, "/seen": "", "/wait": ""}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] not in self.pages:
            return await self.app(scope, receive, send)
        if scope["path"] == "/seen":
            self.seen = json.loads((await receive())["body"])
        while scope["path"] == "/wait" and self.seen is None:
            await asyncio.sleep(0.02)
        headers = [(b"content-type", b"text/html; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.pages[scope["path"]].encode()})


def browse(url, folder, *flags):
    """Opens a page; returns its HTML and the browser's console messages."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=1300,1000", *flags, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def look(folder, routes, width, fields, *flags):
    """Fills the page's form with `fields` and sends it; returns what the page then shows, and console messages."""
    probed: list[Probed] = []

    def wrap(app):
        probed.append(Probed(app, width, fields))
        return probed[0]

    with thread(routes, wrap=wrap, api_key=fields.get("key")) as (url, _):
        _, messages = browse(f"{url}/frame", folder, *(flags or ("--dump-dom",)))
    return probed[0].seen, messages


@pytest.mark.parametrize("width", [390, 1200])
def test_heads_are_shown_token_by_token(tmp_path, width):
    model = adapt(BY_ID["rlora"], sharp_llama())
    seen, messages = look(tmp_path, RunRoutes(model, "mine"), width, {"prompt": "the cat", "tokens": 30})
    assert messages == []
    assert seen["names"] == ["mine"]
    assert (seen["width"], seen["scroll"], seen["wide"]) == (width, width, [])
    tokens = [t for t in alone(model, TOKENIZER("the cat")["input_ids"], 30) if t != 257]
    assert seen["answer"] == decode(TOKENIZER, tokens)
    assert seen["status"] in ("Done.", "Ended at the token limit.")
    assert set(seen["heads"]) <= {1, 2, 3}
    assert len(set(seen["heads"])) > 1
    (over, whole), (one, first) = seen["over"], seen["one"]
    assert over == "Heads"
    assert one.startswith("Heads at")
    for shares in (whole, first):
        assert [name for name, _ in shares] == ["head 1", "head 2", "head 3"]
        assert sum(float(value) for _, value in shares) == pytest.approx(1, abs=0.003)
    assert whole != first
    assert max(first, key=lambda share: float(share[1]))[0] == f"head {seen['heads'][0]}"


def test_adapters_are_shown_with_their_weights(tmp_path):
    model = sharp_llama()
    adapters = random_adapters(model, 3)
    found = {"a0": 0.25, "a2": 0.75}
    routes = PoolRoutes(Named(adapters), PooledModel(model, adapters.__getitem__), lambda text: found)
    seen, messages = look(tmp_path, routes, 390, {"prompt": "the cat", "tokens": 5, "chat": True})
    assert messages == []
    assert seen["names"] == ["auto", "a0", "a1", "a2", "base"]
    assert seen["over"] == ["Adapters", [["a2", "0.750"], ["a0", "0.250"]]]
    assert seen["wide"] == []


def test_a_key_of_any_letters_is_sent(tmp_path):
    seen, messages = look(tmp_path, None, 1200, {"key": "ключ à", "prompt": "x", "tokens": 2})
    assert messages == []
    assert seen["status"] in ("Done.", "Ended at the token limit.")


def test_errors_are_said(tmp_path):
    seen, _ = look(tmp_path, None, 1200, {"prompt": "x", "tokens": 5000})
    assert "at most 1024 tokens" in seen["status"]


def test_the_page_loads_nothing_from_elsewhere():
    with thread(api_key="secret") as (url, _):
        answer = httpx.get(url, timeout=60)
    assert answer.status_code == 200  # it holds no data, so it needs no key
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert not re.search(r"(src|href)=\"(?!data:)", answer.text)
    assert "//" not in answer.text.replace("data:image", "")


def test_under_the_pages_own_policy_nothing_is_blocked(tmp_path):
    with thread() as (url, _):
        html, messages = browse(url, tmp_path, "--virtual-time-budget=20000", "--dump-dom")
    assert messages == []
    assert '<option value="plain">plain</option>' in html
