#!/usr/bin/env python
"""Build the documentation site into _docs, one page a notebook, outputs as stored; needs PyPI alone, no Quarto.

    python tools/site.py [--out DIR]

nbdev processes the notebooks (show_doc, hidden cells, links of names in backticks) and smalldocs renders them by
nbs/_quarto.yml. The pages need no internet: links are relative, KaTeX is a copy, no web fonts.
"""
import argparse, ast, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path
from types import SimpleNamespace

import yaml

from notebooks import CFG, INDEX, NBS, PKG, ROOT, exported, notebooks

VENDOR, CSS = ROOT / "tools/vendor/katex", ROOT / "tools/site.css"
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist/(?:contrib/)?")


def page(nb): return re.sub(r"^\d+[a-zA-Z0-9]*_", "", nb.lower())  # 00_diffusion.ipynb -> diffusion.ipynb, as nbdev links


def evaluated(cell):
    "Is this a cell that show_doc needs run: exported, show_doc itself, or imports and nothing else?"
    if cell.cell_type != "code" or not cell.source or not (tree := cell.parsed_()): return False
    if cell.directives_.get("eval:", [""])[0].lower() == "false": return False
    return bool(cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"}
                or all(isinstance(t, (ast.Import, ast.ImportFrom)) for t in tree)
                or any(isinstance(t, ast.Expr) and isinstance(t.value, ast.Call)
                       and getattr(t.value.func, "id", "") == "show_doc" for t in tree))


def process(folder):
    "Write what nbdev makes of each notebook for the documentation into `folder`."
    import nbdev.doclinks, nbdev.processors
    from execnb.nbio import mk_cell, read_nb, write_nb
    from nbdev.processors import FilterDefaults
    space = {}
    exec(exported().get(INDEX, "d = dict(syms={}, settings={})"), space)
    space["d"]["syms"] = {m: {k: v for k, v in names.items() if not k.rpartition(".")[2].startswith("_")}  # private names have no entry to link to
                          for m, names in space["d"]["syms"].items()}
    index = SimpleNamespace(name=PKG, dist=SimpleNamespace(name=PKG), load=lambda: space["d"])
    nbdev.doclinks.entry_points = lambda group: [index]  # of this checkout, installed or not
    nbdev.processors._do_eval = evaluated
    os.environ["IN_TEST"] = "1"
    sys.path.insert(0, str(ROOT))
    os.chdir(NBS)
    for path in notebooks():
        nb = read_nb(path)
        for c in nb.cells:
            if c.cell_type == "markdown":
                c.source = re.sub(r"(\]\(|href=[\"'])([\w-]+\.ipynb)", lambda m: m[1] + page(m[2]), c.source)
        nb.cells.append(mk_cell("<!-- end -->", "markdown"))  # nbdev looks at the cell after each exported one
        try: FilterDefaults()(nb)
        except Exception as e: raise SystemExit(f"{path.name}: {type(e).__name__}: {e}") from e
        for c in nb.cells: localise_cell(c)
        write_nb(nb, folder / page(path.name))


def localise_cell(cell):
    "Make nbdev's links to the project's own pages relative; without a repository drop the links to its source."
    base = re.escape(f"{CFG['doc_host']}{CFG['doc_baseurl']}".rstrip("/"))
    def mend(text):
        text = re.sub(rf"(\]\(|href=\"){base}/+", r"\1", text)
        if not CFG["git_url"]: text = re.sub(r"<a\b[^>]*>\s*source\s*</a>|\[source\]\([^)]*\)(\{[^}]*\})?", "", text)
        return re.sub(r"(?m)^output-file: .*\n", "", text)
    if cell.cell_type != "code": cell.source = mend(cell.source)
    for o in cell.get("outputs", []):
        for kind, text in o.get("data", {}).items():
            if kind in ("text/markdown", "text/html"):
                o["data"][kind] = mend(text if isinstance(text, str) else "".join(text))


def configure(folder):
    "Copy the Quarto configuration into `folder`; the sidebar lists the notebooks that exist, under their pages' names."
    for p in NBS.glob("*.yml"): shutil.copy(p, folder)
    quarto = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    quarto["format"] = {"html": {k: v for k, v in quarto["format"]["html"].items() if k != "keep-md"}}  # Quarto's alone
    (folder / "_quarto.yml").write_text(yaml.safe_dump(quarto, sort_keys=False), encoding="utf-8")
    def pages(items):
        for item in items:
            if isinstance(item, str):
                if (folder / page(item)).exists(): yield page(item)
            elif "href" in item: yield item
            elif inner := list(pages(item["contents"])): yield {**item, "contents": inner}
    side = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))
    bar = side["website"]["sidebar"]
    bar["contents"] = list(pages(bar["contents"]))
    (folder / "sidebar.yml").write_text(yaml.safe_dump(side, sort_keys=False), encoding="utf-8")
    (folder / "styles.css").write_text((NBS / "styles.css").read_text() + CSS.read_text(), encoding="utf-8")
    if (NBS / "images").is_dir(): shutil.copytree(NBS / "images", folder / "images")


def localise(out):
    "Make the rendered site need no other host: KaTeX from its copy, no web fonts, links relative."
    shutil.copytree(VENDOR, out / "site_libs/katex")
    for p in out.rglob("*.css"):
        text = p.read_text(encoding="utf-8")
        new = re.sub(r"@import\s+(?:url\([^)]*\)|\"[^\"]*\"|'[^']*')[^;]*;", "", text)
        if new != text: p.write_text(new, encoding="utf-8")
    for p in out.rglob("*.html"):
        up = "../" * (len(p.relative_to(out).parts) - 1)
        p.write_text(CDN.sub(f"{up}site_libs/katex/", p.read_text(encoding="utf-8")), encoding="utf-8")


def build(out):
    out = Path(out).resolve()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        process(folder)
        configure(folder)
        subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", str(folder), "--quiet"], check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(folder / CFG["doc_path"], out)
    localise(out)
    print(f"{len(list(out.rglob('*.html')))} pages in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=ROOT / CFG["doc_path"], help="folder for the site, replaced")
    build(parser.parse_args().out)
