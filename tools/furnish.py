"""Furnish the pages that smalldocs rendered: what it leaves out, and an index for the search.

Each page gets a skip link, the contents for narrow screens, links to its notebook, and names for
its buttons. The search of tools/site.js reads `search-index.js`, one entry a section, which a page
loads as a script, so that the search works from a folder too.
"""

import html
import json
import re
from html.parser import HTMLParser
from urllib.parse import quote

from pictures import tex

MAIN = 'id="quarto-document-content"'


# ---------------------------------------------------------------- links to a page's notebook


def page_links(path, cfg):
    "List (text, address, attributes) of a notebook's links; none to hosts that settings.ini omits."
    site = f"notebooks/{quote(path)}"
    links = [("Download the notebook", site, ' download class="local"')]
    place = f"{cfg['repo']}/blob/{cfg['branch']}/{cfg['nbs_path']}/{quote(path)}"
    if cfg["user"] and cfg["git_url"]:
        colab = f"https://colab.research.google.com/github/{cfg['user']}/{place}"
        links.append(("Open in Colab", colab, ""))
    if cfg["git_url"]:
        home = cfg["git_url"].rstrip("/")
        source = f"{home}/blob/{cfg['branch']}/{cfg['nbs_path']}/{quote(path)}"
        links += [("Source", source, ""), ("Report an issue", f"{home}/issues/new", "")]
    return links


def install_command(cfg):
    "Say how the package is installed: from git where settings.ini names it, else from a checkout."
    if cfg["git_url"]:
        return f"pip install 'git+{cfg['git_url']}'"
    return "pip install -e '.[dev]'"


def notebook_bar(path, up, cfg):
    "Write a page's links to its notebook."
    links = "".join(
        f'<a href="{up if "local" in more else ""}{href}"{more}>{text}</a>'
        for text, href, more in page_links(path, cfg)
    )
    return f'<nav class="notebook-links" aria-label="This notebook">{links}</nav>'


# ---------------------------------------------------------------- pages


def inner(text):
    "Return a heading's HTML without the links in it."
    return re.sub(r"</?a\b[^>]*>", "", text)


def headings(text):
    "Return {anchor: inner HTML} of a page's headings; names of the API as code."
    found = {}
    pattern = r"<h([1-6])([^>]*)\bdata-anchor-id=\"([^\"]+)\"[^>]*>(.*?)</h\1>"
    for match in re.finditer(pattern, text, re.S):
        words = inner(match[4])
        found[match[3]] = f"<code>{words}</code>" if " api" in match[2] else words
    return found


def contents(text):
    "Write the contents anew from the headings' HTML, where smalldocs writes LaTeX's source."
    table = re.search(r"<nav id=\"TOC\".*?</nav>|<nav [^>]*id=\"TOC\".*?</nav>", text, re.S)
    if not table:
        return text, ""
    known = headings(text)

    def link(match):
        return match[1] + known.get(html.unescape(match[2]), match[3]) + "</a>"

    written = re.sub(r"(<a [^>]*href=\"#([^\"]*)\"[^>]*>)(.*?)</a>", link, table[0], flags=re.S)
    lists = re.sub(r"<a [^>]*(href=\"[^\"]*\")[^>]*>", r"<a \1>", written)
    lists = lists[lists.index("<ul") : lists.rindex("</ul>") + 5]
    narrow = f'<details class="toc-narrow"><summary>On this page</summary>{lists}</details>'
    return text.replace(table[0], written), narrow


def api_headings(text):
    "Give the headings of names their class: smalldocs gives it to the section around them."
    pattern = r"(<section id=\"[^\"]*\" class=\"level\d) api(\">\s*<h\d class=\"anchored)"
    text = re.sub(pattern, r"\1\2 api", text)
    # within a cell there is no section, and the heading has the class itself
    return text


COLUMNS = re.compile(r"\S {3,}\S")


def tables(text):
    "Let printed columns scroll by themselves where they are wider than the window: others wrap."

    def output(match):
        columns = sum(bool(COLUMNS.search(line)) for line in match[2].splitlines())
        if columns < 2:
            return match[0]
        # a box that scrolls has a place for the keyboard
        return f'<div class="{match[1]} columns">\n<pre tabindex="0"><code>{match[2]}</code></pre>'

    pattern = r'<div class="(cell-output cell-output-stdout)">\s*<pre><code>(.*?)</code></pre>'
    return re.sub(pattern, output, text, flags=re.S)


def whole(text):
    "Keep short names and options on one line, which a narrow table would break at any letter."
    return re.sub(r"<code>([^<\s]{1,22})</code>", r'<code class="whole">\1</code>', text)


def told_apart(text):
    "Say of a link to the next page that it leads to a derivation: chapters have the same names."
    link = r'(href="(?:\.\./)*derivations/[^"]*" class="pagination-link">'
    return re.sub(link + r'(?:<i[^>]*></i> )?<span class="nav-page-text">)', r"\1Derivation ", text)


SEARCH = ('class="smalldocs-search', 'class="site-search')
# (an attribute that smalldocs writes, what stands in its place): names, and places for a keyboard
ATTRIBUTES = (
    (
        'title="Copy to Clipboard" class="code-copy-button"',
        'type="button" aria-label="Copy this code" class="code-copy-button"',
    ),
    (
        'class="quarto-color-scheme-toggle nav-link" href="" title="Toggle dark mode"',
        'class="quarto-color-scheme-toggle nav-link" href="#" role="button"'
        ' title="Toggle dark mode" aria-label="Toggle dark mode"',
    ),
    ('role="button" id="quarto-back-to-top"', 'href="#" id="quarto-back-to-top"'),
    (
        'aria-label="Search" autocomplete="off"',
        'aria-label="Search" autocomplete="off" role="combobox" aria-expanded="false"'
        ' aria-controls="search-results" aria-autocomplete="list"',
    ),
    (
        'class="site-search-results dropdown-menu"',
        'class="site-search-results dropdown-menu" id="search-results" role="listbox"'
        ' aria-label="Pages found"',
    ),
)


def furnished(text, up, bar=""):
    "Return a rendered page with what it lacks; `up` leads to the site's root."
    text = told_apart(whole(tables(api_headings(text))))
    text, narrow = contents(text)
    text = text.replace(*SEARCH)
    for old, new in ATTRIBUTES:
        text = text.replace(old, new)
    text = re.sub(r"<script src=\"[^\"]*fuse[^\"]*\"></script>", "", text)
    text = text.replace("</head>", f'<script src="{up}site_libs/site.js" defer></script></head>', 1)
    skip = '<a class="skip-link" href="#quarto-document-content">Skip to the text</a>'
    text = re.sub(r"(<body[^>]*>)", rf"\1{skip}", text, count=1)
    text = text.replace(MAIN, f'{MAIN} tabindex="-1"', 1)
    head = re.search(r"<header id=\"title-block-header\".*?</header>", text, re.S)
    return text.replace(head[0], head[0] + bar + narrow, 1) if head else text


# ---------------------------------------------------------------- search


class Sections(HTMLParser):
    "Read a page's sections for the search: heading, anchor, prose and tables, code."

    SKIP = {"script", "style", "button", "nav", "details", "svg", "figcaption"}
    BLOCKS = {"p", "li", "td", "th", "tr", "div", "pre", "h1", "h2", "h3", "h4", "section", "br"}

    def __init__(self):
        super().__init__()
        self.depth, self.skipped, self.code, self.head, self.math = 0, [], 0, None, False
        self.sections = [dict(id="", title="", text="", code="")]

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        classes = (attrs.get("class") or "").split()
        if tag == "main":
            self.depth = 1
        if not self.depth or tag in ("img", "br", "hr", "input", "meta", "link", "col"):
            return
        output = "cell-output-stdout" in classes or "cell-output-stderr" in classes
        if self.skipped or tag in self.SKIP or output or "breadcrumb" in classes:
            self.skipped.append(tag)
        elif tag == "pre":
            self.code += 1
        elif tag in ("h1", "h2", "h3", "h4", "h5"):
            self.head = tag
            anchor = attrs.get("data-anchor-id") or attrs.get("id") or ""
            if tag != "h1":
                self.sections.append(dict(id=anchor, title="", text="", code=""))
        elif "math" in classes:
            self.math = True
        if tag in self.BLOCKS:
            self._add(" ")

    def handle_endtag(self, tag):
        if not self.depth:
            return
        if self.skipped:
            if self.skipped[-1] == tag:
                self.skipped.pop()
        elif tag == "main":
            self.depth = 0
        elif tag == "pre":
            self.code -= 1
        elif tag == self.head:
            self.head = None
        elif tag == "span":
            self.math = False

    def handle_data(self, data):
        if self.depth and not self.skipped:
            self._add(tex(data) if self.math else data)

    def _add(self, data):
        field = "title" if self.head else "code" if self.code else "text"
        self.sections[-1][field] += data


def search_entries(text, href):
    "List a page's entries for the search: address, page's title, section, text, code."
    parser = Sections()
    parser.feed(text)
    title = " ".join(parser.sections[0]["title"].split())
    entries = []
    for k, section in enumerate(parser.sections):
        section = {name: " ".join(words.split()) for name, words in section.items()}
        # one code point for minus and other signs that keyboards lack stays as it is: it is shown
        place = f"{href}#{section['id']}" if section["id"] else href
        name = section["title"] if k else ""
        entries.append([place, title, name, section["text"], section["code"]])
    return [e for e in entries if e[2] or e[3] or not e[0].count("#")]


def write_index(entries, path):
    "Write the search's entries as a script."
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    path.write_text(f"window.siteSearchIndex={text};\n", encoding="utf-8")
