#!/usr/bin/env python
"""Build the documentation site into _docs, one page a notebook, outputs as stored, without Quarto.

    python tools/site.py [--out DIR]

nbdev processes the notebooks (show_doc, hidden cells, links of names in backticks), and smalldocs
renders them by nbs/_quarto.yml. entries.py writes the entries of names and their index, pictures.py
the pictures' texts, cells.py folds, furnish.py adds links to notebooks and the search's index; what
links to the repository stands there only if settings.ini names it (user, git_url, doc_host).

The pages need no internet: links are relative, KaTeX is a copy, there are no web fonts. KaTeX comes
from npm once and then from a cache; DDPO_KATEX names another folder with its `dist`.
"""

import argparse
import ast
import base64
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import cells
import entries
import furnish
import yaml
from notebooks import CFG, INDEX, NBS, PKG, ROOT, exported, notebooks, read
from pictures import Captions

CSS, JS = ROOT / "tools/site.css", ROOT / "tools/site.js"
KATEX = "0.16.11"  # what smalldocs 0.5.4 loads
# of the package on npm, as `npm view katex@0.16.11 dist.integrity` says
KATEX_SHA512 = (
    "RQrI8rlHY92OLf3rho/Ts8i/XvjgguEjOkO1BEXcU3N8BqPpSzBNwV/G0Ukr+P/l3ivvJUE/Fa/CwbS6HesGNQ=="
)
KATEX_FILES = ("katex.min.css", "katex.min.js", "contrib/auto-render.min.js", "fonts/*.woff2")
SHARED_PICTURE = "images/front.png"  # of nbs/, shown where a link to the site is shared
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist/")


def page(path):
    "Name a notebook's page as nbdev links it: book/01_diffusion.ipynb -> book/diffusion.ipynb."
    folder, _, file = path.rpartition("/")
    return f"{folder}/".lstrip("/") + re.sub(r"^\d+[a-zA-Z0-9]*_", "", file.lower())


def source(path):
    "Name a notebook by its path from nbs/."
    return path.relative_to(NBS).as_posix()


# ---------------------------------------------------------------- notebooks into pages


def evaluated(cell):
    "Say whether show_doc needs a cell run: it exports, is show_doc itself, or holds only imports."
    if cell.cell_type != "code" or not cell.source or not (tree := cell.parsed_()):
        return False
    if cell.directives_.get("eval:", [""])[0].lower() == "false":
        return False
    if cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"}:
        return True
    calls = [t.value for t in tree if isinstance(t, ast.Expr) and isinstance(t.value, ast.Call)]
    if any(getattr(call.func, "id", "") == "show_doc" for call in calls):
        return True
    return all(isinstance(t, (ast.Import, ast.ImportFrom)) for t in tree)


def name_index():
    "Return nbdev's index of this checkout's names: public ones; a method has its class's entry."
    # nbdev's anchors are in lower case, where `Summary` and `summary` are one; here they are names
    space = {}
    exec(exported(index=True)[INDEX], space)
    names = space["d"]["syms"]
    for module, places in names.items():
        public = {}
        for name, (place, file) in places.items():
            parts = name.removeprefix(f"{module}.").split(".")
            if not any(part.startswith("_") for part in parts):
                public[name] = (f"{place.partition('#')[0]}#{parts[0]}", file)
        names[module] = public
    return SimpleNamespace(name=PKG, dist=SimpleNamespace(name=PKG), load=lambda: space["d"])


def exported_module(nb):
    "Return the module that a notebook exports, or nothing."
    texts = (cell.source for cell in nb.cells if cell.cell_type == "code")
    found = next(filter(None, (re.search(r"#\|\s*default_exp\s+(\S+)", t) for t in texts)), None)
    return importlib.import_module(f"{PKG}.{found[1]}") if found else None


def numbered(nb, path):
    "Put a notebook's number before its title, for links to it and the search; return the title."
    number = re.match(r"\d*", path.name)[0]
    front = nb.cells[0]
    fields = yaml.safe_load(front.source.strip().strip("-"))
    title = fields["title"]
    fields["title"] = f"{number} {title}".strip()
    front.source = f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"
    return title


def process(folder, index):
    "Write what nbdev makes of each notebook for the documentation into `folder`."
    import nbdev.doclinks
    import nbdev.processors
    import nbdev.showdoc
    from execnb.nbio import mk_cell, read_nb, write_nb

    nbdev.doclinks.entry_points = lambda group: [index]  # of this checkout, installed or not
    nbdev.processors._do_eval = evaluated
    nbdev.showdoc.BasicMarkdownRenderer = entries.Entry
    os.environ["IN_TEST"] = "1"
    sys.path.insert(0, str(ROOT))
    for path in notebooks():
        os.chdir(path.parent)
        nb = read_nb(path)
        entries.Entry.home = exported_module(nb)
        # nbdev looks at the cell after each exported one
        nb.cells.append(mk_cell("<!-- end -->", "markdown"))
        try:
            nbdev.processors.FilterDefaults()(nb)
        except Exception as e:
            raise SystemExit(f"{source(path)}: {type(e).__name__}: {e}") from e
        cells.shown(nb, Captions(numbered(nb, path)))
        target = folder / page(source(path))
        for cell in nb.cells:
            localise_cell(cell, "../" * (len(target.relative_to(folder).parts) - 1))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, target)


def mend(text, up):
    "Make links relative, name pages by their pages' names, drop links to a source that is nowhere."
    base = re.escape(f"{CFG['doc_host']}{CFG['doc_baseurl']}".rstrip("/"))
    text = re.sub(rf"(\]\(|href=\"){base}/+", rf"\1{up}", text)
    text = re.sub(
        r"(\]\(|href=[\"'])((?:[\w.-]+/)*[\w-]+\.ipynb)", lambda m: m[1] + page(m[2]), text
    )
    if not CFG["git_url"]:
        text = re.sub(r"<a\b[^>]*>\s*source\s*</a>|\[source\]\([^)]*\)(\{[^}]*\})?", "", text)
    return re.sub(r"(?m)^output-file: .*\n", "", text)


def localise_cell(cell, up):
    "Mend the links of a cell and of its outputs; `up` leads from its page to the site's root."
    if cell.cell_type != "code":
        cell.source = mend(cell.source, up)
    for output in cell.get("outputs", []):
        for kind, text in output.get("data", {}).items():
            if kind in ("text/markdown", "text/html"):
                text = text if isinstance(text, str) else "".join(text)
                output["data"][kind] = mend(text, up)


# ---------------------------------------------------------------- pages beside the notebooks


def module_pages(index):
    "Return {module: the page whose notebook exports it}."
    pages = {}
    for module, names in index.load()["syms"].items():
        module = module.removeprefix(f"{PKG}.")
        if names and module != PKG and not module.endswith("__init__"):
            pages[module] = next(iter(names.values()))[0].partition("#")[0]
    return pages


def _page(title, description, text):
    "Write a page of Markdown."
    front = yaml.safe_dump(dict(title=title, description=description), sort_keys=False)
    return f"---\n{front}---\n\n{text}\n"


def bibtex(citation):
    "Write CITATION.cff's fields as an entry of BibTeX."
    fields = dict(
        title=citation["title"],
        author=" and ".join(a.get("name") or a["family-names"] for a in citation["authors"]),
        year=str(citation["date-released"])[:4],
        version=citation["version"],
    )
    if CFG["git_url"]:
        fields["url"] = CFG["git_url"]
    lines = [f"  {name:8}= {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@software{{{PKG},", *lines, "}"])


def cite_page():
    "Write the page on citing, from CITATION.cff."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    papers = "\n".join(
        f"* {r['title']} ({r['year']}). {r['notes']}" for r in citation["references"]
    )
    text = (
        f"{citation['message']} As BibTeX:\n\n```bibtex\n{bibtex(citation)}\n```\n\n"
        "The methods are other people's. Please cite the paper of the one that you use:\n\n"
        f"{papers}\n\nThe same for programs: `CITATION.cff` in the repository.\n"
    )
    return _page("Citing", "How to name this project, and whose methods it has", text)


def text_page(file, description):
    "Make a page of a Markdown file of the repository; its heading becomes the title."
    head, _, text = (ROOT / file).read_text(encoding="utf-8").partition("\n")
    links = re.sub(r"\]\(nbs/", "](", text)  # the site's root is nbs/
    return _page(head.lstrip("# "), description, mend(links, ""))


def licence_page():
    "Write the page of the licence, with the notices."
    texts = [(ROOT / file).read_text(encoding="utf-8").strip() for file in ("NOTICE", "LICENSE")]
    blocks = "\n\n".join(f"```\n{text}\n```" for text in texts)
    return _page("Licence", "Apache-2.0, and what the package owes to others", blocks)


def write_pages(folder, index):
    "Write the pages that no notebook makes."
    pages = {
        "names.md": entries.index_page(PKG, module_pages(index)),
        "changes.md": text_page("CHANGELOG.md", "What is new, version by version"),
        "contributing.md": text_page("CONTRIBUTING.md", "How to build, test and change it"),
        "cite.md": cite_page(),
        "licence.md": licence_page(),
    }
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


def copy_notebooks(out):
    "Copy the notebooks into the site, each with a line on what it needs."
    import nbformat

    needs = (
        f"This notebook is a page of {PKG} {CFG['version']}. It runs where the package is installed"
        f" (`{furnish.install_command(CFG)}`); cells that read other files of the repository need a"
        " checkout."
    )
    for path in notebooks():
        nb = read(path)
        note = nbformat.v4.new_markdown_cell(needs, id="needs")
        nb.cells.insert(1, note)
        target = out / "notebooks" / source(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)


# ---------------------------------------------------------------- configuration


def entry(path):
    "Return a notebook's line in the sidebar: its number and its title."
    title = read(NBS / path).cells[0].source.splitlines()[0].lstrip("# ")
    number = re.match(r"\d*", PurePosixPath(path).name)[0]
    return {"text": f"{number} {title}".strip(), "href": page(path)}


def sidebar(items):
    "Keep of the sidebar's lines those whose notebook exists, under their pages' names."
    for item in items:
        if isinstance(item, dict) and "href" in item:
            yield item
        elif isinstance(item, dict):
            if contents := list(sidebar(item["contents"])):
                yield {**item, "contents": contents}
        elif (NBS / item).exists():
            yield entry(item)


def footer():
    "Return the footer: version, licence, changes, citation, and the repository if it has one."
    left = f"{PKG} {CFG['version']} · [Apache-2.0](/licence.md)"
    links = ["[Changes](/changes.md)", "[Citing](/cite.md)", "[Contributing](/contributing.md)"]
    if CFG["git_url"]:
        home = CFG["git_url"].rstrip("/")
        links += [f"[Repository]({home})", f"[Issues]({home}/issues)"]
    return dict(left=left, right=" · ".join(links))


def website(site):
    "Add to the site's configuration what follows from settings.ini."
    site["page-footer"] = footer()
    if CFG["doc_host"]:  # a picture in shared links needs an absolute address
        site["site-url"] = f"{CFG['doc_host']}{CFG['doc_baseurl']}"
        site["image"] = SHARED_PICTURE
    return site


def configure(folder):
    "Copy the Quarto configuration, the sidebar, the styles and the pictures into `folder`."
    for path in NBS.glob("*.yml"):
        shutil.copy(path, folder)
    quarto = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    html = quarto["format"]["html"]
    quarto["format"] = {"html": {k: v for k, v in html.items() if k != "keep-md"}}  # Quarto's alone
    quarto["website"] = website(quarto["website"])
    side = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))
    bar = side["website"]["sidebar"]
    bar["contents"] = list(sidebar(bar["contents"]))
    for file, content in (("_quarto.yml", quarto), ("sidebar.yml", side)):
        (folder / file).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    styles = (NBS / "styles.css").read_text(encoding="utf-8") + CSS.read_text(encoding="utf-8")
    (folder / "styles.css").write_text(styles, encoding="utf-8")
    if (NBS / "images").is_dir():
        shutil.copytree(NBS / "images", folder / "images")


# ---------------------------------------------------------------- KaTeX


def fetch_katex(folder):
    "Fetch KaTeX from npm into `folder`, or exit with what to do."
    way_out = "or name a folder with KaTeX's `dist` in DDPO_KATEX"
    if not (npm := shutil.which("npm")):
        sys.exit(
            f"The site needs KaTeX {KATEX}, which is not at {folder}, and npm, which would fetch"
            f" it, is not here: install npm (Debian: apt-get install npm), {way_out}."
        )
    with tempfile.TemporaryDirectory() as tmp:
        pack = [npm, "pack", f"katex@{KATEX}", "--silent", "--pack-destination", tmp]
        done = subprocess.run(pack, capture_output=True, text=True)
        archive = Path(tmp) / f"katex-{KATEX}.tgz"
        if done.returncode or not archive.exists():
            sys.exit(f"npm did not fetch KaTeX {KATEX}: try again, {way_out}.\n{done.stderr}")
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != KATEX_SHA512:
            sys.exit(f"npm's KaTeX {KATEX} has the SHA-512 {digest}, not {KATEX_SHA512}.")
        with tarfile.open(archive) as tar:
            tar.extractall(tmp, filter="data")
        # moved at once, so that a folder that exists is whole
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent)) / "dist"
        shutil.copytree(Path(tmp) / "package/dist", part)
        shutil.copy(Path(tmp) / "package/LICENSE", part)
        if not folder.exists():
            part.rename(folder)
        shutil.rmtree(part.parent)


def katex():
    "Return the folder of KaTeX's `dist`: DDPO_KATEX, or a cache that npm fills once."
    if given := os.environ.get("DDPO_KATEX"):
        missing = [f for f in KATEX_FILES if not list(Path(given).glob(f))]
        if missing:
            sys.exit(f"DDPO_KATEX: {given} has no {', '.join(missing)}.")
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / PKG / f"katex-{KATEX}"
    if not folder.exists():
        fetch_katex(folder)
    return folder


# ---------------------------------------------------------------- the site


def localise(out):
    "Make the rendered site need no other host: KaTeX from its copy, no web fonts."
    dist = katex()
    for file in (f for pattern in (*KATEX_FILES, "LICENSE") for f in dist.glob(pattern)):
        copy = out / "site_libs/katex" / file.relative_to(dist)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for path in out.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        font = r"@import\s+(?:url\([^)]*\)|\"[^\"]*\"|'[^']*')[^;]*;"
        path.write_text(re.sub(font, "", text), encoding="utf-8")
    for path in out.rglob("*.html"):
        up = "../" * (len(path.relative_to(out).parts) - 1)
        text = path.read_text(encoding="utf-8")
        path.write_text(CDN.sub(f"{up}site_libs/katex/", text), encoding="utf-8")


def furnish_site(out):
    "Add to the rendered pages what smalldocs leaves out, and write the search's index."
    sources = {page(source(path)).replace(".ipynb", ".html"): source(path) for path in notebooks()}
    found = []
    for path in sorted(out.rglob("*.html"), key=lambda p: (p.name != "index.html", p)):
        name = path.relative_to(out).as_posix()
        up = "../" * name.count("/")
        text = path.read_text(encoding="utf-8")
        bar = furnish.notebook_bar(sources[name], up, CFG) if name in sources else ""
        path.write_text(furnish.furnished(text, up, bar), encoding="utf-8")
        found += furnish.search_entries(text, name)
    furnish.write_index(found, out / "search-index.js")
    (out / "search.json").unlink()
    shutil.rmtree(out / "site_libs/fuse")
    shutil.copy(JS, out / "site_libs/site.js")


def build(out):
    "Build the site into the folder `out`, which it replaces."
    out = Path(out).resolve()
    katex()  # before minutes are spent
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        index = name_index()
        process(folder, index)
        write_pages(folder, index)
        configure(folder)
        render = [sys.executable, "-m", "smalldocs.cli", "render", str(folder), "--quiet"]
        subprocess.run(render, check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(folder / CFG["doc_path"], out)
    localise(out)
    furnish_site(out)
    copy_notebooks(out)
    print(f"{len(list(out.rglob('*.html')))} pages in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=ROOT / CFG["doc_path"], help="folder, which is replaced")
    build(parser.parse_args().out)
