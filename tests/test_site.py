"""The documentation site: it builds from the notebooks, and every page works without internet.

Needs Chromium (Debian: chromium), which playwright drives; no other browser is fetched.
DDPO_BROWSER names another binary; DDPO_NO_BROWSER=1 leaves the static checks only.
"""

import dataclasses
import functools
import html as html_module
import importlib
import importlib.util
import inspect
import json
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
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from ddpo_scratch.prompts import SOURCES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import cells  # noqa: E402
import entries  # noqa: E402
import furnish  # noqa: E402
import notebooks as nbt  # noqa: E402
import pictures  # noqa: E402

# by its path: Python has a module `site` of its own
_spec = importlib.util.spec_from_file_location("tools_site", ROOT / "tools/site.py")
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)


def page_of(path):
    "Name a notebook's page: nbs/book/01_diffusion.ipynb -> book/diffusion.html."
    name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem.lower())
    return path.with_name(f"{name}.html").relative_to(nbt.NBS).as_posix()


PAGES = [page_of(path) for path in nbt.notebooks()]
BESIDE = ["names.html", "changes.html", "cite.html", "contributing.html", "licence.html"]
EVERY = PAGES + BESIDE


@pytest.fixture(scope="module")
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
        self.ids, self.links, self.loads, self.pictures = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag == "img" or a.get("role") == "img" and tag == "svg":
            self.pictures.append((a.get("alt") or a.get("aria-label") or "").strip())
        if tag == "link" or "src" in a:
            self.loads.append(a.get("href") or a.get("src") or "")


@pytest.fixture(scope="module")
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
    assert sorted(html) == sorted(EVERY)


@pytest.mark.parametrize("page", EVERY)
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


@pytest.mark.parametrize("page", EVERY)
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
    found = re.findall(r"<img[^>]+src=\"(?:data:image/png|[^\"]*_files/)", text)
    assert len(found) >= stored


# ---------------------------------------------------------------- ways through, out and in


@pytest.fixture(scope="module")
def text(built):
    "Every page, without the class that keeps short code on one line."
    pages = {page: (built / page).read_text(encoding="utf-8") for page in EVERY}
    return {page: raw.replace('<code class="whole">', "<code>") for page, raw in pages.items()}


def neighbours(text):
    "Return the pages before and after a page, as its links at the end say."
    nav = re.search(r"<nav class=\"page-navigation\">.*?</nav>", text, re.S)[0]
    sides = re.findall(r"nav-page-(previous|next)\">(?:<a href=\"([^\"]+)\")?", nav)
    return {side: href for side, href in sides if href}


def test_previous_and_next_follow_the_sidebar(built, text):
    listed = re.findall(
        r"sidebar-link(?: active)?\"[^>]*>|href=\"([^\"]+)\" class=\"sidebar-item-text",
        text["index.html"],
    )
    order = [href for href in listed if href]
    assert sorted(order) == sorted(EVERY)
    assert order[:4] == ["index.html", "first_hour.html", "book/tour.html", "book/diffusion.html"]
    for before, after in zip(order, order[1:], strict=False):
        assert target(built, before, neighbours(text[before])["next"]) == after
        assert target(built, after, neighbours(text[after])["previous"]) == before


@pytest.mark.parametrize("page", EVERY)
def test_footer_and_way_back(text, html, page):
    footer = text[page][text[page].index("<footer") :]
    assert f"{nbt.PKG} {nbt.CFG['version']}" in footer and "Apache-2.0" in footer
    names = [posixpath.basename(link) for link in re.findall(r"href=\"([^\"]+)\"", footer)]
    assert names[:4] == ["licence.html", "changes.html", "cite.html", "contributing.html"]
    assert re.search(r"<a [^>]*href=\"#\" id=\"quarto-back-to-top\"", text[page])


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in nbt.notebooks()])
def test_chapters_have_their_number_in_title_and_sidebar(text, path):
    title = nbt.read(path).cells[0].source.splitlines()[0].lstrip("# ")
    full = f"{re.match('[0-9]*', path.name)[0]} {title}".strip()
    page = text[page_of(path)].replace("&#x27;", "'").replace("’", "'")
    assert re.search(rf"<h1 class=\"title\">{re.escape(full)}</h1>", page)
    if path.stem != "index":
        assert f'<span class="menu-text">{full}</span>' in page


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in nbt.notebooks()])
def test_notebook_can_be_downloaded(built, html, path):
    page = page_of(path)
    links = [link for link in html[page].links if link.endswith(".ipynb")]
    links = [link for link in links if not urlsplit(link).netloc]  # others lead to Colab
    assert len(links) == 1
    file = built / target(built, page, links[0])
    cells = nbt.read(file).cells
    assert file.name == path.name and "pip install" in cells[1].source
    assert [c.source for c in cells[:1] + cells[2:]] == [c.source for c in nbt.read(path).cells]


PUBLISHED = dict(
    user="ann", git_url="https://github.com/ann/ddpo_scratch", doc_host="https://ann.github.io"
)


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("git_url", [False, True])
def test_links_to_colab_and_repository_need_their_settings(user, git_url):
    cfg = dict(nbt.CFG) | dict(user="", git_url="")
    cfg |= {k: PUBLISHED[k] for k, on in (("user", user), ("git_url", git_url)) if on}
    links = {words: href for words, href, _ in furnish.page_links("book/05_ppo.ipynb", cfg)}
    assert links["Download the notebook"] == "notebooks/book/05_ppo.ipynb"
    assert ("Open in Colab" in links) == (user and git_url)
    assert ("Source" in links) == ("Report an issue" in links) == git_url
    place = "ann/ddpo_scratch/blob/main/nbs/book/05_ppo.ipynb"
    if git_url:
        assert links["Source"] == f"https://github.com/{place}"
        assert furnish.install_command(cfg) == f"pip install 'git+{PUBLISHED['git_url']}'"
    if user and git_url:
        assert links["Open in Colab"] == f"https://colab.research.google.com/github/{place}"


def test_pages_link_to_the_repository_only_where_settings_name_it(text):
    hosts = {"Open in Colab": "user", "Report an issue": "git_url"}
    for words, setting in hosts.items():
        assert (words in text["index.html"]) == bool(nbt.CFG[setting] and nbt.CFG["git_url"])


def test_shared_links_show_a_picture_where_the_site_has_a_host(monkeypatch):
    for name in PUBLISHED:
        monkeypatch.setitem(nbt.CFG, name, "")
    bare = site.website({})
    assert bare.keys() == {"page-footer"} and "Repository" not in bare["page-footer"]["right"]
    for name, value in PUBLISHED.items():
        monkeypatch.setitem(nbt.CFG, name, value)
    there = site.website({})
    assert there["site-url"] == "https://ann.github.io/ddpo_scratch/"
    assert (nbt.NBS / there["image"]).is_file()
    assert "[Issues](https://github.com/ann/ddpo_scratch/issues)" in there["page-footer"]["right"]


def test_citation_and_changes_are_of_this_version(text):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == nbt.CFG["version"] and citation["cff-version"] == "1.2.0"
    assert f"## {nbt.CFG['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert "@software{ddpo_scratch," in site.bibtex(citation)
    assert "DDPO" in text["cite.html"] and "arxiv" not in site.bibtex(citation)


def test_first_hour_uses_options_that_exist():
    from ddpo_scratch.cli import commands as cli
    from ddpo_scratch.config import TrainConfig, preset_names

    words = "\n".join(c.source for c in nbt.read(nbt.NBS / "first_hour.ipynb").cells)
    source = inspect.getsource(cli) + "--logdir"
    fields = TrainConfig.__dataclass_fields__
    options = set(re.findall(r"(?<= --)[a-z_]+\b", words)) - {"num_epochs"}
    unknown = {o for o in options if o not in fields and not re.search(rf"\b{o}\b", source)}
    assert len(options) > 12 and not unknown
    assert set(re.findall(r"--preset (\w+)", words)) <= set(preset_names())


# ---------------------------------------------------------------- names


def exporting():
    "Return {module: the page of the notebook that exports it}."
    found = {}
    for path in nbt.notebooks():
        words = re.search(r"#\| default_exp ([a-z0-9_.]+)", path.read_text(encoding="utf-8"))
        if words and not words[1].endswith("__init__"):
            found[words[1]] = page_of(path)
    return found


MODULES = exporting()


def entry_of(text, name):
    "Return the HTML of a name's entry on its page."
    start = text.index(f'id="{name}" class="anchored api"')
    return text[start : text.index("</div>\n</div>", text.index('class="call"', start)) + 400]


@pytest.mark.parametrize("module", MODULES)
def test_entries_have_tables_with_what_is_returned(text, module):
    loaded = importlib.import_module(f"ddpo_scratch.{module}")
    page = text[MODULES[module]]
    for name in loaded.__all__:
        symbol = getattr(loaded, name)
        if not inspect.isfunction(symbol):
            continue
        entry = entry_of(page, name)
        for parameter in inspect.signature(symbol).parameters:
            assert re.search(rf"<tr><td><code>\*{{0,2}}{parameter}</code>", entry), (
                name,
                parameter,
            )
        assert '<tr class="returns">' in entry, f"{name} does not say what it returns"
        assert "Call self as a function" not in entry


@pytest.mark.parametrize("command", ["ddpo_train", "ddpo_sample", "ddpo_eval"])
def test_commands_have_documentation_of_their_own(text, command):
    from ddpo_scratch.cli import commands as cli

    entry = entry_of(text["library/cli.html"], command)
    assert entries.first_line(getattr(cli, command)) in entry.replace("&#x27;", "'")
    assert f"{command}(args=None)" in entry


def test_train_config_is_a_table_for_each_group(text):
    from ddpo_scratch.config import TrainConfig

    entry = text["library/config.html"]
    for field in dataclasses.fields(TrainConfig):
        row = re.search(rf"<tr><td><code>{field.name}</code></td>.*?</tr>", entry)[0]
        kind, default, what = re.findall(r"<td>(.*?)</td>", row)[1:]
        assert kind and default and len(what) > 3, f"{field.name}: {row}"
    groups = entries.field_groups([f.name for f in dataclasses.fields(TrainConfig)])
    assert len(groups) > 6 and all(f"<caption>{group}</caption>" in entry for group in groups)
    with pytest.raises(ValueError, match="TrainConfig: speed: in no group"):
        entries.field_groups(["seed", "speed"])


def planted(
    x,  # (b,) `numbers`
    n=3,  # how <often>
    *,
    kind: str = "a",  # of them
    **more,  # the rest
) -> list:  # (b,) texts
    """Do it.

    And more."""


def test_an_entry_says_all_that_stands_beside_the_parameters():
    entry = entries.Entry(planted)._repr_markdown_()
    assert entry.startswith("### planted {#planted .api}")
    assert "planted(x, n=3, *, kind='a', **more)" in entry.replace("&#x27;", "'")
    assert "<td>(b,) <code>numbers</code></td>" in entry and "how &lt;often&gt;" in entry
    assert "<code>int</code></td><td><code>3</code>" in entry and "<p>And more.</p>" in entry
    assert "<td><code>**more</code></td><td></td><td></td><td>the rest</td>" in entry
    last = "<td><strong>returns</strong></td><td><code>list</code></td><td></td><td>(b,) texts</td>"
    assert last in entry


def test_index_has_every_public_name_with_a_line_and_a_link(built, html, text):
    page = text["names.html"]
    for module in MODULES:
        loaded = importlib.import_module(f"ddpo_scratch.{module}")
        for name in loaded.__all__:
            place = rf"<a href=\"{MODULES[module]}[^\"]*\"><code>{name}</code></a></td>"
            row = re.search(place + r"<td><code>([\w.]+)</code></td><td>(.*?)</td>", page)
            assert row and row[2], f"{module}.{name} has no line"


def test_constants_are_told_by_their_comments():
    source = "__all__ = ['A', 'B']\n# what A\n# is\nA = 1\nB = 2  # what B is\nC = 3  # no\n"
    assert entries.constants(source) == {"A": "what A is", "B": "what B is"}


# ---------------------------------------------------------------- cells


def test_exported_source_is_folded(text):
    assert not [
        page for page in EVERY if re.search(r"<details open[^>]*class=\"code-fold", text[page])
    ]
    assert sum(t.count("<summary>Source</summary>") for t in text.values()) > 100


def cell(source, kind="code", outputs=()):
    return SimpleNamespace(source=source, cell_type=kind, get=lambda name: list(outputs))


@pytest.mark.parametrize(
    "source, summary",
    [
        ("assert a\nassert b == 1", "checks"),
        ("for x in y:\n    assert x\ntorch.testing.assert_close(a, b)", "checks"),
        ("#| hide_line\nassert a", "checks"),
        ("import os\nfrom a import b", "imports"),
        ("def show(x):\n    plt.imshow(x)", "how it is drawn"),
        (
            "def fails(f):\n    try:\n        f()\n    except E as e:\n        print(e)",
            "a helper that shows an error's text",
        ),
        ("def check_two(x):\n    assert x", "how an answer is checked"),
        ("x = 1\nassert x", ""),
        ("print(1)", ""),
        ("def law(x):\n    return x", ""),
        ('#| code-fold: true\n#| code-summary: "one solution"\nassert a', ""),
    ],
)
def test_cells_that_only_check_or_help_are_folded(source, summary):
    assert cells.summary_of(source, []) == summary
    if summary == "checks":
        assert cells.summary_of(source, ["printed"]) == ""


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in nbt.notebooks()])
def test_no_cell_of_asserts_stands_open(text, path):
    folds = r"<details class=\"code-fold\">.*?</details>"
    page = re.sub(folds, "", text[page_of(path)], flags=re.S)
    blocks = re.findall(r"<code class=\"sourceCode python\">(.*?)</code>", page, re.S)
    open_ = {html_module.unescape(re.sub(r"<[^>]+>", "", block)).strip() for block in blocks}
    for code in nbt.code_cells(nbt.read(path)):
        only = [line for line in code.source.splitlines() if not line.startswith("assert ")]
        assert only or code.outputs or code.source.strip() not in open_, code.source


def test_a_heading_that_is_a_name_leaves_the_anchor_to_its_entry():
    text = cells.apart("## fit\n\n### `train`\n\n## fit it\n\n## other", {"fit", "train"})
    heads = ["## fit {#about-fit}", "### `train` {#about-train}", "## fit it", "## other"]
    assert text.split("\n\n") == heads


def test_helpers_and_entries_come_together():
    head = '#| code-fold: show\n#| code-summary: "Exported source"\n'
    run = [
        SimpleNamespace(source=head + "def _wide():\n    pass", cell_type="code", outputs=[]),
        SimpleNamespace(source="show_doc(b)", cell_type="code", outputs=[]),
        SimpleNamespace(
            source=head + "def a():\n    pass\n\n\ndef b():\n    pass", cell_type="code", outputs=[]
        ),
        SimpleNamespace(source="show_doc(a)", cell_type="code", outputs=[]),
    ]
    for item in run:
        item.get = lambda name, default: default
    prose = SimpleNamespace(source="text", cell_type="markdown")
    done = cells.arranged([*run, prose])
    assert [c.source.splitlines()[-1] for c in done] == [
        "show_doc(a)",
        "show_doc(b)",
        "    pass",
        "text",
    ]
    assert "_wide" in done[2].source and 'code-summary: "Source"' in done[2].source
    alone = cells.arranged(
        [SimpleNamespace(**vars(run[0]) | dict(source=head + "def _wide():\n    pass"))]
    )
    assert 'code-summary: "Source of _wide"' in alone[0].source


@pytest.mark.parametrize(
    "raw, mended",
    [
        ("see [[`f`](a.html#f)](b.ipynb)", "see [`f`](b.ipynb)"),
        ("| a | $r(x)$ or 0 | b |", "| a | $r(x)$ or 0<!-- --> | b |"),
        ("| a | 0 | b |", "| a | 0 | b |"),
        ("[`f`](b.ipynb) and 0 | $x$", "[`f`](b.ipynb) and 0 | $x$"),
    ],
)
def test_markup_that_the_renderer_misreads(raw, mended):
    assert cells.mended(raw) == mended


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_has_an_alternative_text_and_a_caption(html, text, page):
    assert all(len(alt) > 15 for alt in html[page].pictures), html[page].pictures
    assert text[page].count("<figcaption>") >= text[page].count('src="data:image/png')
    assert not re.search(r"<figcaption><b>Figure \d+\.</b>\s*</figcaption>", text[page])


PROSE = "# Act one\n\nThe **policy** moves ($\\sigma=0$) from `a` to [b](c.ipynb). More."
PLOT = 'ax.plot(x)\nax.set(xlabel="epoch", title=f"seed {s}")\nax.set_ylabel("kB")'


def test_alternative_texts_come_from_directive_prose_and_code():
    assert pictures.alternative('#| fig-alt: "A fox"\nshow(x)', PROSE, "s") == "A fox"
    said = "The policy moves (σ=0) from a to b."
    assert pictures.alternative("show(x)", PROSE, "s") == f"{said} Pictures."
    plot = "A plot (x: epoch; y: kB; titles: seed …)."
    assert pictures.alternative(PLOT, PROSE, "s") == f"{said} {plot}"
    assert pictures.alternative(PLOT, "The same:", "Act one") == f"Act one: The same. {plot}"


def test_pictures_are_captioned_and_numbered():
    told = pictures.Captions("Title")
    told.read(PROSE)
    code = SimpleNamespace(
        source="show(x)", outputs=[dict(data={"image/png": "QUJD"}) for _ in "ab"]
    )
    code.get = lambda name, default: code.outputs
    told.tell(code)
    first, second = (output["data"]["text/html"] for output in code.outputs)
    assert "<b>Figure 1.</b> Act one, 1 of 2" in first and "<b>Figure 2.</b>" in second
    assert 'alt="The policy moves (σ=0) from a to b. Pictures, 2 of 2."' in second
    assert 'src="data:image/png;base64,QUJD"' in first


def test_readme_tells_its_pictures():
    told = re.findall(r"!\[([^\]]*)\]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert told and all(len(words) > 15 for words in told)


@pytest.mark.parametrize("git_url", ["", PUBLISHED["git_url"]])
def test_readme_shows_its_pictures_on_a_package_index(tmp_path, git_url):
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    settings = re.sub(r"(?m)^git_url =.*$", f"git_url = {git_url}", settings)
    (tmp_path / "settings.ini").write_text(settings, encoding="utf-8")
    for file in ("setup.py", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "--long-description"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", shown)
    place = f"{git_url}/raw/main/nbs/images/" if git_url else "nbs/images/"
    assert found and all(picture.startswith(place) for picture in found)
    if git_url:
        assert f"]({git_url}/blob/main/nbs/book/01_diffusion.ipynb)" in shown


# ---------------------------------------------------------------- text without raw markup

RAW = re.compile(
    r"\$\$.*|\$[^$\n]{1,80}\$|\]\([^)\s]+\.(?:ipynb|html|md)[^)]*\)"  # formulas, links
    r"|\\[(\[].*|\\[a-zA-Z]{2,}\b.*|\*\*\w[^*]*\w\*\*(?!\w)"  # LaTeX, bold
)


@pytest.mark.parametrize(
    "raw", ["$r(x_0)$", "[f](a.ipynb)", r"\eta=1", r"\(x\)", r"\frac{a}{b}", "$$x$$", "**bold**"]
)
def test_raw_markup_is_seen(raw):
    assert RAW.search(f"a {raw} b") and not RAW.search("a costs 5 $ or [0, 1] (x) 2*3")


def index_of(built):
    script = (built / "search-index.js").read_text(encoding="utf-8")
    return json.loads(script.removeprefix("window.siteSearchIndex=").rstrip(";\n"))


def test_search_reads_words_not_markup(built):
    found = index_of(built)
    assert {entry[0].partition("#")[0] for entry in found} == set(EVERY)
    for href, title, section, prose, _ in found:
        raw = [RAW.search(words) for words in (title, section, prose)]
        assert not any(raw), f"{href}: {[m[0] for m in raw if m]}"


@pytest.mark.parametrize(
    "formula, words",
    [
        (r"\eta=1", "η=1"),
        (r"\frac{a}{b}\le\sigma_t", "a/b≤σ_t"),
        (r"\mathcal N(0,I)", "N(0,I)"),
        (r"\begin{aligned}a &= b,\\ c &= d\end{aligned}", "a = b, c = d"),
    ],
)
def test_formulas_as_words(formula, words):
    assert pictures.tex(formula).replace(" ", "") == words.replace(" ", "")


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
        self.page.evaluate(PROBE)

    def js(self, expression):
        return self.page.evaluate(expression)

    def wait(self, expression):
        return self.page.wait_for_function(expression)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def url(built):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


PROBE = (ROOT / "tests/probe.js").read_text(encoding="utf-8")
FAILED = "[...document.querySelectorAll('.katex-error')].map(e => e.title + e.textContent)"
LOST = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.parametrize("page", EVERY)
def test_page_in_browser(browser, built, url, page):
    browser.open(url + page)
    assert not browser.complaints
    assert browser.js("document.querySelector('h1').textContent.trim()"), "no title"
    text = (built / page).read_text(encoding="utf-8")
    formulas = len(re.findall(r'class="math (?:inline|display)"', text))
    assert browser.js("document.querySelectorAll('.katex').length") >= formulas
    assert browser.js(FAILED) == [], "a formula that KaTeX does not read"
    assert not RAW.findall(browser.js("probe.text()")), "raw markup in the text"
    assert not RAW.findall(browser.js("probe.heads()")), "raw markup in headings or contents"
    assert browser.js(LOST) == [], "a picture does not load"
    assert browser.js("probe.scrolling()") == [], "code that does not wrap"
    browser.page.set_viewport_size({"width": 390, "height": 800})
    assert browser.js(OVERFLOW) <= 1, "wider than a telephone"
    assert browser.js("probe.scrolling()") == [], "code that does not wrap on a telephone"


@pytest.mark.parametrize(
    "printed, is_table",
    [
        ("method     saved    named\nAWM         39.9      8%", True),
        ("a reward of 1.5\n  and of 2.5", False),
        ("one line    of columns", False),
    ],
)
def test_printed_columns_are_known(printed, is_table):
    raw = f'<div class="cell-output cell-output-stdout">\n<pre><code>{printed}</code></pre>\n</div>'
    found = furnish.tables(raw)
    assert ("columns" in found.partition(">")[0]) == is_table and printed in found


def test_short_code_stays_whole():
    found = furnish.whole(
        "<td><code>--reward_fn</code> or <code>ddpo_train --reward_fn R</code></td>"
    )
    assert '<code class="whole">--reward_fn</code>' in found and "<code>ddpo_train -" in found


def test_next_pages_of_one_name_are_told_apart(built):
    last = (built / "book/horizon.html").read_text(encoding="utf-8")
    assert '<span class="nav-page-text">Derivation 01 Diffusion</span>' in last
    first = (built / "derivations/diffusion.html").read_text(encoding="utf-8")
    assert '<span class="nav-page-text">02 Rollout</span>' in first


@pytest.mark.parametrize(
    "value, said",
    [
        (["a" * 30, "b" * 30, "c" * 30], f"a list: {'a' * 30}, {'b' * 30}, …"),
        (7, "an int: 7"),
        (SOURCES, "Hold things by name"),
    ],
    ids=["a long list", "a number", "a registry"],
)
def test_the_index_says_what_a_constant_is(value, said):
    assert entries.contents(value).startswith(said)


def test_printed_tables_scroll_on_a_telephone(browser, url):
    browser.open(url + "book/results.html")
    browser.page.set_viewport_size({"width": 390, "height": 800})
    heights = browser.js(
        "[...document.querySelectorAll('.columns pre code')].map(e => "
        "e.getBoundingClientRect().height / e.textContent.split('\\n').length)"
    )
    assert heights and max(heights) < 25, "a line takes more than one"


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


# ---------------------------------------------------------------- contrast


@pytest.fixture
def dark(browser, url):
    "Switch the pages to dark, and back."
    toggle = "document.querySelector('.quarto-color-scheme-toggle').click()"
    browser.open(url + "index.html")
    browser.js(toggle)
    browser.wait("document.documentElement.classList.contains('quarto-dark')")
    yield
    browser.open(url + "index.html")
    browser.js(toggle)
    browser.wait("!document.documentElement.classList.contains('quarto-dark')")


def pale(browser):
    "List the texts of a page with a contrast below 4.5, once each place."
    browser.page.wait_for_timeout(200)
    found = browser.js("probe.contrast()")
    assert len(found) > 60
    return {where: (round(ratio, 2), words) for ratio, words, where in found if ratio < 4.5}


LOOKED_AT = ["index.html", "book/diffusion.html", "library/config.html", "names.html"]


@pytest.mark.parametrize("page", LOOKED_AT)
def test_contrast_in_light(browser, url, page):
    browser.open(url + page)
    assert not pale(browser)


@pytest.mark.parametrize("page", LOOKED_AT)
def test_contrast_in_dark(browser, url, dark, page):
    browser.open(url + page)
    browser.wait("document.documentElement.classList.contains('quarto-dark')")
    assert not pale(browser)


def test_contrast_is_measured(browser, url, built):
    page = built / "pale.html"
    lines = "".join(f"<p>{k}</p>" for k in range(70))
    page.write_text(f'<body style="background:#fff">{lines}<i style="color:#2780e3">a</i>')
    browser.open(url + page.name)
    page.unlink()
    assert pale(browser) == {"I.": (3.97, "a")}


# ---------------------------------------------------------------- search


def hits(browser, query):
    "Return the addresses that the search finds, best first, with their titles."
    found = browser.page.evaluate("q => window.siteSearch(q, 8)", query)
    return [(href, section or page) for href, page, section, *_ in found]


@pytest.mark.parametrize(
    "query, first",
    [
        ("how do I use my own reward", r"first_hour.html#your-own-reward"),
        ("train on my own prompts", r"first_hour.html#your-own-prompts"),
        ("colab", r"first_hour.html#in-colab-or-on-kaggle"),
        ("gpu", r"first_hour.html#on-a-gpu|index.html#what-you-need"),
        ("install", r"first_hour.html#install"),
        ("batch size", r"library/config.html.*"),
        ("ddim_mean_std", r"derivations/diffusion.html#ddim_mean_std"),
        ("TrainConfig", r"library/config.html#TrainConfig"),
        ("how can I resume a run?", r"first_hour.html#stop-resume-train-longer|library/.*"),
        ("what is the clip range", r"(book|derivations)/(ppo|rollout|tour).html#.*clip.*"),
        (
            "jupyter",
            r"first_hour.html#open-these-notebooks|index.html#what-you-need|contributing.html.*",
        ),
        ("ddim_maen_std", r"derivations/diffusion.html#ddim_mean_std"),
        ("bibtex", r"cite.html"),
    ],
)
def test_search_answers(browser, url, query, first):
    browser.open(url + "index.html")
    found = hits(browser, query)
    assert found and re.fullmatch(first, found[0][0]), found


def test_search_guesses_only_where_nothing_is_found(browser, url):
    browser.open(url + "library/config.html")
    assert all("olaps" not in title for _, title in hits(browser, "colab"))
    assert hits(browser, "advantege")[0][0].endswith("/advantage.html")
    assert hits(browser, "qqqqzzzz") == []
    assert hits(browser, "how do I")  # nothing but small words still finds something


@pytest.mark.parametrize("page", [PAGES[0], PAGES[-1]])
def test_search_list(browser, url, page):
    browser.open(url + page)
    browser.page.keyboard.press("/")
    browser.page.keyboard.type("noise")
    browser.wait("document.querySelectorAll('.search-result').length > 2")
    assert "noise" in browser.page.inner_text(".site-search-results").lower()
    active = "[...document.querySelectorAll('.search-result')].findIndex(e => e.matches('.active'))"
    for key, place in (("ArrowDown", 0), ("ArrowDown", 1), ("ArrowUp", 0), ("ArrowUp", -1)):
        browser.page.keyboard.press(key)
        last = browser.js("document.querySelectorAll('.search-result').length") - 1
        assert browser.js(active) == (last if place < 0 else place)
    browser.page.keyboard.press("ArrowDown")
    there = browser.js("document.querySelector('.search-result.active').href")
    browser.page.keyboard.press("Enter")
    browser.page.wait_for_url(there)
    assert browser.js("!!document.querySelector('h1')") and not browser.complaints


def list_colours(browser):
    browser.page.fill(".site-search input", "noise")
    browser.wait("document.querySelectorAll('.search-result').length > 2")
    style = "getComputedStyle(document.querySelector('.site-search-results'))"
    return lightness(browser.js(f"{style}.backgroundColor")), not pale(browser)


def test_the_list_of_found_pages_is_light_in_light(browser, url):
    browser.open(url + "index.html")
    back, legible = list_colours(browser)
    assert back > 700 and legible


def test_the_list_of_found_pages_is_dark_in_dark(browser, url, dark):
    browser.open(url + "index.html")
    back, legible = list_colours(browser)
    assert back < 200 and legible


def test_search_works_from_a_folder(browser, built):
    browser.page.goto((built / "book/ppo.html").as_uri())
    assert hits(browser, "ddim_mean_std")[0][0] == "derivations/diffusion.html#ddim_mean_std"


# ---------------------------------------------------------------- telephone, keyboard, paper


def visible(browser, selector):
    return browser.page.locator(selector).first.is_visible()


def test_telephone(browser, url):
    browser.open(url + "book/ppo.html")
    browser.page.set_viewport_size({"width": 390, "height": 800})
    browser.page.wait_for_timeout(400)
    for part in (".site-search input", ".quarto-color-scheme-toggle", ".toc-narrow summary"):
        assert visible(browser, part), f"{part} is not reachable"
    assert not visible(browser, ".toc-narrow a") and not visible(browser, ".sidebar-link")
    browser.page.click(".toc-narrow summary")
    links = browser.js("document.querySelectorAll('.toc-narrow a').length")
    assert links == browser.js("document.querySelectorAll('#TOC a.nav-link').length") > 5
    browser.page.click(".toc-narrow a >> nth=1")
    assert not visible(browser, ".toc-narrow a") and "#" in browser.page.url
    browser.page.click(".quarto-btn-toggle")
    browser.page.wait_for_timeout(400)
    top = "document.querySelector('.sidebar-link').getBoundingClientRect().top"
    bar = "document.querySelector('#quarto-header').getBoundingClientRect().bottom"
    assert browser.js(f"{top} - {bar}") >= 0, "the sidebar begins behind the bar"
    browser.page.keyboard.press("Escape")
    browser.page.wait_for_timeout(400)
    assert not visible(browser, ".sidebar-link")


@pytest.mark.parametrize("page", ["library/config.html", "library/cli.html"])
def test_wide_tables_scroll_in_their_own_box(browser, url, page):
    browser.open(url + page)
    for width in (1400, 390):
        browser.page.set_viewport_size({"width": width, "height": 800})
        assert browser.js("probe.cut()") == []


def test_keyboard(browser, url):
    browser.open(url + "book/ppo.html")
    browser.page.keyboard.press("Tab")
    assert browser.js("document.activeElement.className") == "skip-link"
    assert browser.js("document.activeElement.getBoundingClientRect().top") >= 0
    browser.page.keyboard.press("Enter")
    browser.page.keyboard.press("Tab")
    assert browser.js("!!document.activeElement.closest('main')"), "the skip link leads nowhere"
    button = "document.querySelector('main > section .code-copy-button')"
    assert browser.js(f"{button}.getAttribute('aria-label')") == "Copy this code"
    browser.js(f"{button}.focus()")
    browser.page.wait_for_timeout(250)
    assert float(browser.js(f"getComputedStyle({button}).opacity")) > 0.7
    unnamed = """[...document.querySelectorAll('button, a')].filter(e =>
      !e.textContent.trim() && !e.getAttribute('aria-label') && !e.title).length"""
    assert browser.js(unnamed) == 0


def test_paper(browser, url):
    browser.open(url + "book/ppo.html")
    browser.page.emulate_media(media="print")
    browser.page.set_viewport_size({"width": 700, "height": 1000})
    for part in ("#quarto-header", "#quarto-sidebar", ".page-navigation", ".code-copy-button"):
        assert not visible(browser, part), f"{part} is printed"
    assert visible(browser, "main h1") and browser.js("probe.scrolling()") == []
    assert browser.js(OVERFLOW) <= 1
    browser.page.emulate_media(media="screen")


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
