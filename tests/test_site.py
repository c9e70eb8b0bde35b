"""The documentation site: it builds from the notebooks, and every page works without internet.

Needs Chromium (Debian: chromium), which playwright drives; no other browser is fetched.
DDPO_BROWSER names another binary; DDPO_NO_BROWSER=1 leaves the static checks only.
"""

import functools
import os
import posixpath
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import notebooks as nbt  # noqa: E402


def page_of(path):
    "Name a notebook's page: nbs/book/01_diffusion.ipynb -> book/diffusion.html."
    name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem.lower())
    return path.with_name(f"{name}.html").relative_to(nbt.NBS).as_posix()


PAGES = [page_of(path) for path in nbt.notebooks()]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "docs"
    done = subprocess.run(
        [sys.executable, ROOT / "tools/site.py", "--out", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(DDPO_KATEX=""), "is not here: install npm"),
        (dict(DDPO_KATEX="."), "DDPO_KATEX: . has no katex.min.css"),
    ],
)
def test_without_katex_the_build_says_what_to_do(tmp_path, more, message):
    env = os.environ | dict(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)) | more
    command = [sys.executable, ROOT / "tools/site.py", "--out", tmp_path / "docs"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr, done.stderr


class Html(HTMLParser):
    "What one page links to, loads, and can be linked at."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "link" or "src" in a:
            self.loads.append(a.get("href") or a.get("src") or "")


@pytest.fixture(scope="session")
def html(built):
    return {p.relative_to(built).as_posix(): Html(p) for p in built.rglob("*.html")}


def target(built, page, href):
    "Return the file of the site that a link on `page` leads to, by its path in the site."
    path = unquote(urlsplit(href).path)
    file = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    return posixpath.join(file, "index.html") if (built / file).is_dir() else file


def broken(built, html, page):
    "List the links on a page of the site that lead to no file, or to no place in their file."
    links = []
    for href in html[page].links:
        url = urlsplit(href)
        if url.scheme or url.netloc:
            continue
        file = target(built, page, href)
        nowhere = file in html and url.fragment and unquote(url.fragment) not in html[file].ids
        if nowhere or not (built / file).is_file():
            links.append(href)
    return sorted(set(links))


def test_one_page_a_notebook(html):
    assert sorted(html) == sorted(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors(built, html, page):
    assert not (links := broken(built, html, page)), f"{page}: broken {links}"


def test_links_see_planted_faults(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "index.html").write_text('<h1 id="top"></h1>')
    links = ["../index.html#top", "../index.html#end", "index.html", "#here", "https://a.org/x"]
    text = "".join(f'<a href="{link}"></a>' for link in links)
    (tmp_path / "book/a.html").write_text(text + '<p id="here">')
    html = {name: Html(tmp_path / name) for name in ("index.html", "book/a.html")}
    assert broken(tmp_path, html, "book/a.html") == ["../index.html#end", "index.html"]


@pytest.mark.parametrize("page", PAGES)
def test_loads_only_its_own_files(built, html, page):
    loads = [h for h in html[page].loads if not h.startswith("data:")]
    away = [
        h for h in loads if urlsplit(h).netloc or not (built / target(built, page, h)).is_file()
    ]
    assert not away, f"{page} loads {away}"


def test_styles_load_no_other_host(built):
    foreign = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"' ]*")
    away = [f"{p.name}: {m}" for p in built.rglob("*.css") for m in foreign.findall(p.read_text())]
    assert not away, away


def shown(cell):
    hidden = r"hide|exporti?|default_exp.*|(output|include):\s*false"
    return not any(re.fullmatch(hidden, d) for d in nbt.directives(cell))


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in nbt.notebooks()])
def test_page_has_every_stored_picture(built, path):
    text = (built / page_of(path)).read_text(encoding="utf-8")
    outputs = [o for c in nbt.code_cells(nbt.read(path)) if shown(c) for o in c.outputs]
    stored = sum("image/png" in o.get("data", {}) for o in outputs)
    pictures = re.findall(r"<img[^>]+src=\"(?:data:image/png|[^\"]*_files/)", text)
    assert len(pictures) >= stored


# ---------------------------------------------------------------- in a browser


class Tab:
    "One tab of the browser, and what it complains of since a page was opened."

    def __init__(self, page):
        self.page, self.complaints = page, []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self._note(f"exception: {error}"))
        page.on("requestfailed", self._failed)
        page.on("response", self._response)
        page.on("request", self._request)

    def _note(self, message):
        self.complaints.append(message)

    def _console(self, message):
        if message.type in ("error", "assert"):
            self._note(f"console: {message.text}")

    def _failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # the page was left before it had loaded
            self._note(f"failed: {request.url}")

    def _response(self, response):
        if response.status >= 400:
            self._note(f"{response.status}: {response.url}")

    def _request(self, request):
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob", "about") and url.hostname != "127.0.0.1":
            self._note(f"another host: {request.url}")

    def open(self, url):
        "Load a page to its end, fonts included, in a window for a desk."
        self.complaints.clear()
        self.page.set_viewport_size({"width": 1400, "height": 1000})
        self.page.goto(url)
        self.page.evaluate("document.fonts.ready.then(() => true)")

    def js(self, expression):
        return self.page.evaluate(expression)

    def wait(self, expression):
        return self.page.wait_for_function(expression)


@pytest.fixture(scope="session")
def browser():
    if os.environ.get("DDPO_NO_BROWSER"):
        pytest.skip("DDPO_NO_BROWSER is set")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = (os.environ.get("DDPO_BROWSER"), *map(shutil.which, names))
    if not (binary := next(filter(None, found), None)):
        pytest.fail(
            "no Chromium here: install it (Debian: apt-get install chromium), name it in"
            " DDPO_BROWSER, or set DDPO_NO_BROWSER=1"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        chromium = play.chromium.launch(executable_path=binary, args=args)
        yield Tab(chromium.new_page())
        chromium.close()


@pytest.fixture(scope="session")
def url(built):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


TEXT = """() => {
  const main = document.querySelector('main').cloneNode(true);
  main.querySelectorAll('pre, code, .katex, script, style').forEach(e => e.remove());
  return main.textContent }"""
FAILED = "[...document.querySelectorAll('.katex-error')].map(e => e.title + ': ' + e.textContent)"
LOST = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("page", PAGES)
def test_page_in_browser(browser, built, url, page):
    browser.open(url + page)
    assert not browser.complaints
    assert browser.js("document.querySelector('h1').textContent.trim()"), "no title"
    text = (built / page).read_text(encoding="utf-8")
    formulas = len(re.findall(r'class="math (?:inline|display)"', text))
    assert browser.js("document.querySelectorAll('main .katex').length") >= formulas
    assert browser.js(FAILED) == [], "a formula that KaTeX does not read"
    raw = r"\$\$.*|\\\(.*|\\\[.*|\\(?:frac|theta|mathbb|sqrt)\b.*"
    assert not re.findall(raw, browser.js(TEXT)), "raw LaTeX in the text"
    assert browser.js(LOST) == [], "a picture does not load"
    browser.page.set_viewport_size({"width": 390, "height": 800})
    assert browser.js(OVERFLOW) <= 1, "wider than a telephone"


def lightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def test_dark_mode(browser, url):
    back = "getComputedStyle(document.body).backgroundColor"
    toggle = "document.querySelector('.quarto-color-scheme-toggle').click()"
    browser.open(url + PAGES[0])
    light = browser.js(back)
    browser.js(toggle)
    browser.wait(f"{back} != '{light}'")
    dark = browser.js(back)
    assert lightness(light) > 600 and lightness(dark) < 200, (light, dark)
    browser.open(url + PAGES[-1])
    browser.wait(f"{back} == '{dark}'")  # the choice holds on the next page, in another folder
    browser.js(toggle)
    browser.wait(f"{back} == '{light}'")
    assert not browser.complaints


@pytest.mark.parametrize("page", [PAGES[0], PAGES[-1]])
def test_search(browser, url, page):
    browser.open(url + page)
    browser.page.fill(".smalldocs-search input", "noise")
    browser.wait("document.querySelectorAll('.search-result').length > 0")
    assert "noise" in browser.page.inner_text(".smalldocs-search-results").lower()
    browser.js("document.querySelector('.search-result').click()")
    browser.wait("document.readyState == 'complete' && !!document.querySelector('h1')")
    assert not browser.complaints


def test_browser_sees_planted_faults(browser, url, built):
    page = built / "fault.html"
    page.write_text(
        '<img src="nowhere.png"><script>console.error("oh"); throw Error("no")</script>'
    )
    browser.open(url + page.name)
    page.unlink()
    messages = " ".join(browser.complaints)
    assert all(word in messages for word in ("404", "console: oh", "exception: no")), messages
    assert len(browser.js(LOST)) == 1
