"""The documentation site: builds from the notebooks, and every page works in a browser without internet.

Needs Chromium (Debian: chromium). DDPO_BROWSER names another binary; DDPO_NO_BROWSER=1 leaves the static checks only.
"""
import functools
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import notebooks as nbt  # noqa: E402

PAGES = [re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem.lower()) + ".html" for p in nbt.notebooks()]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "docs"
    done = subprocess.run([sys.executable, ROOT / "tools/site.py", "--out", out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


class Html(HTMLParser):
    "What one page links to, loads, and can be linked at."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "link" or "src" in a: self.loads.append(a.get("href") or a.get("src") or "")


@pytest.fixture(scope="session")
def html(built): return {p.name: Html(p) for p in built.glob("*.html")}


def test_one_page_a_notebook(html): assert sorted(html) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors(built, html, page):
    wrong = []
    for href in html[page].links:
        u = urlsplit(href)
        if u.scheme or u.netloc: continue
        target = unquote(u.path) or page
        if target.endswith("/"): target = posixpath.normpath(target + "index.html")
        if not (built / target).is_file(): wrong.append(href)
        elif u.fragment and target in html and unquote(u.fragment) not in html[target].ids: wrong.append(href)
    assert not wrong, f"{page}: broken {sorted(set(wrong))}"


@pytest.mark.parametrize("page", PAGES)
def test_loads_only_its_own_files(built, html, page):
    away = [h for h in html[page].loads if not h.startswith("data:") and (urlsplit(h).netloc or not (built / unquote(urlsplit(h).path)).is_file())]
    assert not away, f"{page} loads {away}"


def test_styles_load_no_other_host(built):
    away = [f"{p.name}: {m}" for p in built.rglob("*.css") for m in re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"' ]*", p.read_text())]
    assert not away, away


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in nbt.notebooks()])
def test_page_has_every_stored_picture(built, path):
    page = built / (re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem.lower()) + ".html")
    text = page.read_text(encoding="utf-8")
    shown = [c for c in nbt.code_cells(nbt.read(path)) if not any(d in ("hide", "export", "exporti") or d.startswith(("default_exp", "output: false", "include: false")) for d in nbt.directives(c))]
    pictures = sum("image/png" in o.get("data", {}) for c in shown for o in c.outputs)
    assert len(re.findall(r"<img[^>]+src=\"data:image/png", text)) + len(re.findall(r"<img[^>]+src=\"[^\"]*_files/", text)) >= pictures


# ---------------------------------------------------------------- in a browser

class Browser:
    "One tab of a headless Chromium, driven through the DevTools protocol."

    def __init__(self, binary, profile):
        import websocket
        self.process = subprocess.Popen(
            [binary, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
             "--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={profile}", "--window-size=1400,1000",
             "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self._until(lambda: (profile / "DevToolsActivePort").read_text().split() if (profile / "DevToolsActivePort").exists() else None, 60)
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{port[0]}{port[1]}", timeout=60)
        self.count, self.events, self.session = 0, [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"): self.send(f"{domain}.enable")

    def _until(self, ready, seconds):
        end = time.monotonic() + seconds
        while not (value := ready()):
            assert time.monotonic() < end, "the browser did not answer"
            assert self.process.poll() is None, f"the browser stopped with code {self.process.returncode}"
            time.sleep(.05)
        return value

    def _receive(self):
        message = json.loads(self.socket.recv())
        if "method" in message: self.events.append(message)
        return message

    def send(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params,
                                     **({"sessionId": self.session} if self.session else {})}))
        while (message := self._receive()).get("id") != self.count: pass
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def js(self, expression):
        "The value of a JavaScript expression, promises awaited."
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression): return self._until(lambda: self.js(expression), 30)

    def open(self, url):
        "Load a page to its end, fonts and deferred scripts included; its events are in `events`."
        self.send("Page.navigate", url="about:blank")
        self.wait("location.href == 'about:blank' && document.readyState == 'complete'")
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'")
        self.js("document.fonts.ready.then(() => new Promise(r => setTimeout(() => r(true), 100)))")

    def complaints(self):
        "Console errors, exceptions, failed or foreign requests since the page was opened."
        found = []
        for e in self.events:
            m, p = e["method"], e["params"]
            if m == "Runtime.exceptionThrown": found.append(f"exception: {p['exceptionDetails']}")
            if m == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"): found.append(f"console: {p['args']}")
            if m == "Log.entryAdded" and p["entry"]["level"] == "error": found.append(f"log: {p['entry']['text']} {p['entry'].get('url', '')}")
            if m == "Network.loadingFailed" and not p.get("canceled"): found.append(f"failed: {p}")
            if m == "Network.responseReceived" and p["response"]["status"] >= 400: found.append(f"{p['response']['status']}: {p['response']['url']}")
            if m == "Network.requestWillBeSent":
                url = urlsplit(p["request"]["url"])
                if url.scheme not in ("data", "blob", "about") and url.hostname != "127.0.0.1": found.append(f"other host: {p['request']['url']}")
        return found

    def close(self):
        try: self.send("Browser.close")
        except Exception: pass
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if os.environ.get("DDPO_NO_BROWSER"): pytest.skip("DDPO_NO_BROWSER is set")
    names = [os.environ["DDPO_BROWSER"]] if os.environ.get("DDPO_BROWSER") else ["chromium", "chromium-browser", "google-chrome", "chrome"]
    binary = next(filter(None, map(shutil.which, names)), None)
    assert binary, "no Chromium found: install it (Debian: apt-get install chromium), name it in DDPO_BROWSER, or set DDPO_NO_BROWSER=1"
    tab = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture(scope="session")
def url(built):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


TEXT = """(() => { const m = document.querySelector('main').cloneNode(true);
  m.querySelectorAll('pre, code, .katex, script, style').forEach(e => e.remove()); return m.textContent })()"""


@pytest.mark.parametrize("page", PAGES)
def test_page_in_browser(browser, built, url, page):
    browser.open(url + page)
    assert not browser.complaints()
    assert browser.js("document.querySelector('h1').textContent.trim()"), "no title"
    formulas = len(re.findall(r'class="math (?:inline|display)"', (built / page).read_text(encoding="utf-8")))
    assert browser.js("document.querySelectorAll('main .katex').length") >= formulas
    assert browser.js("[...document.querySelectorAll('.katex-error')].map(e => e.title + ': ' + e.textContent)") == []
    assert not re.findall(r"\$\$.*|\\\(.*|\\\[.*|\\(?:frac|theta|mathbb|sqrt)\b.*", browser.js(TEXT)), "raw LaTeX in the text"
    assert browser.js("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0, "a picture does not load"


@pytest.mark.parametrize("page", PAGES)
def test_page_fits_a_telephone(browser, url, page):
    browser.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
    try:
        browser.open(url + page)
        assert browser.js("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 1
    finally: browser.send("Emulation.clearDeviceMetricsOverride")


def test_dark_mode(browser, url):
    browser.open(url + PAGES[0])
    back = "getComputedStyle(document.body).backgroundColor"
    light = browser.js(back)
    browser.js("document.querySelector('.quarto-color-scheme-toggle').click()")
    browser.wait(f"{back} != {json.dumps(light)}")
    dark = browser.js(back)
    assert sum(map(int, re.findall(r"\d+", light)[:3])) > 600 and sum(map(int, re.findall(r"\d+", dark)[:3])) < 200, (light, dark)
    browser.open(url + PAGES[-1])
    browser.wait(f"{back} == {json.dumps(dark)}")  # the choice holds on the next page
    browser.js("document.querySelector('.quarto-color-scheme-toggle').click()")
    browser.wait(f"{back} == {json.dumps(light)}")
    assert not browser.complaints()


def test_search(browser, url):
    browser.open(url + PAGES[0])
    browser.js("""(() => { const i = document.querySelector('.smalldocs-search input'); i.focus(); i.value = 'noise';
        i.dispatchEvent(new Event('input', {bubbles: true})) })()""")
    browser.wait("document.querySelectorAll('.search-result').length > 0")
    assert "noise" in browser.js("document.querySelector('.smalldocs-search-results').textContent.toLowerCase()")
    browser.js("document.querySelector('.search-result').click()")
    browser.wait("document.readyState == 'complete' && !!document.querySelector('h1')")
    assert not browser.complaints()
