#!/usr/bin/env python
"""Keep notebooks, package and README.md in step.

python tools/notebooks.py export [--check]               notebooks -> ddpo_scratch/**/*.py
python tools/notebooks.py run [--stale] [notebook ...]   execute notebooks, store their outputs
python tools/notebooks.py check [notebook ...]           are stored outputs up to date?
python tools/notebooks.py readme [--check]               nbs/index.ipynb -> README.md

`pytest nbs/book/05_ppo.ipynb` runs a notebook and stores nothing; `python tools/site.py` makes the
documentation site.
"""

import argparse
import base64
import difflib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
import stale
from stale import code_cells

ROOT = Path(__file__).resolve().parents[1]
_ini = ConfigParser()
_ini.read(ROOT / "settings.ini", encoding="utf-8")
CFG = _ini["DEFAULT"]
NBS, LIB = ROOT / CFG["nbs_path"], ROOT / CFG["lib_path"]
PKG = LIB.name
INDEX = "_modidx.py"  # nbdev's list of names and pages; the site needs it, git does not keep it
MAX_BYTES = 500_000  # of a notebook, outputs included
LARGE = 40_000  # of a picture in base64: smaller ones are stored as they are
ENOUGH = 50_000  # of a picture that was made smaller: nine of them fit a notebook
SKIP = "skip-execution"  # the tag by which nbclient, and so nbmake, leaves a cell out
# "ddpo_train=ddpo_scratch.cli.commands:ddpo_train" -> {"ddpo_train": "cli"}
COMMANDS = dict(re.findall(rf"(\w+)={PKG}\.([\w.]+):", CFG["console_scripts"]))


def environment():
    "Return what a kernel finds around it: this checkout first, and nothing that asks another host."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    fixed = dict(PYTHONHASHSEED="0", PYTHONPATH=path)
    defaults = dict(
        HF_HUB_OFFLINE="1",
        WANDB_MODE="disabled",
        PYTHONWARNINGS="ignore:IProgress not found",  # tqdm asks for widgets, which nothing needs
        JUPYTER_PREFER_ENV_PATH="1",  # this environment's kernel, not another of the same name
    )
    return {**defaults, **os.environ, **fixed}


def notebooks(paths=()):
    "List the notebooks at `paths`, by default all of them, in the order of reading."
    if paths:
        files = [Path(path).resolve() for path in paths]
        if missing := [p for p in files if not p.is_file() or p.suffix != ".ipynb"]:
            sys.exit(f"not a notebook: {', '.join(map(str, missing))}")
        return files
    files = NBS.rglob("*.ipynb")
    files = (p for p in files if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
    return sorted(files, key=lambda p: (p.parent != NBS, p.stem != "index", p.as_posix()))


def name(path):
    "Name a file by its path from the root."
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def read(path):
    return nbformat.read(path, as_version=4)


def write(nb, path):
    "Write a notebook, if that changes it."
    text = nbformat.writes(nb) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def directives(cell):
    return [m[1].strip() for m in re.finditer(r"^[ \t]*#\|(.*)$", cell.source, re.M)]


def skipped(cell):
    "Say whether a cell is not executed: `#| eval: false`, or a flag of tst_flags (settings.ini)."
    flags = CFG["tst_flags"].split()
    return any(d in flags or re.fullmatch(r"eval:\s*false", d, re.I) for d in directives(cell))


# ---------------------------------------------------------------- clean form


def tidy(nb):
    "Bring `nb` to the form that is committed: nbdev_clean's, with ids that follow from the text."
    from nbdev.clean import clean_nb

    nb = nbformat.from_dict(nb)
    for cell in code_cells(nb):
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if "metadata" in output:
                output.metadata = {}
    clean_nb(nb, allowed_metadata_keys=CFG["allowed_metadata_keys"].split())
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    kept = {k: v for k, v in nb.metadata.items() if k in CFG["allowed_metadata_keys"].split()}
    nb.metadata = {"kernelspec": kernel, **kept}
    times = {}
    for cell in nb.cells:
        key = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        times[key] = times.get(key, 0) + 1
        cell.id = key if times[key] == 1 else f"{key}-{times[key]}"
        cell.metadata = {"tags": [SKIP]} if cell.cell_type == "code" and skipped(cell) else {}
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nbformat.from_dict(nb)


_bars = re.compile(r"\d+%\||\d(?:it|s)/(?:it|s)\b|\bit/s\b")  # what tqdm prints


def _without_places(text):
    for place, instead in ((f"{ROOT}/", ""), (f"{sys.prefix}/", ""), (f"{Path.home()}/", "~/")):
        text = text.replace(place, instead)
    return text


def _scrub_stream(output):
    lines = [line.rsplit("\r", 1)[-1] for line in _without_places(output.text).split("\n")]
    if output.name == "stderr":
        lines = [line for line in lines if not _bars.search(line)]
    output.text = "\n".join(lines)


def _encoded(picture, **options):
    "Encode a picture as base64 text."
    picture.save(file := io.BytesIO(), **options)
    return base64.b64encode(file.getvalue()).decode()


def _smaller(encoded, kind):
    "Keep fewer colours of a large PNG, and less detail of a large JPEG, where that saves bytes."
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    if kind == "image/jpeg":
        # half of JPEG's scale: titles of 9 points stay sharp
        return min(encoded, _encoded(picture, format="JPEG", quality=55, optimize=True), key=len)
    for colours in (256, 128, 96):
        # k-means keeps black text black and a colour bar in order; no dithering, which would add
        # noise that compresses badly
        few = picture.quantize(colours, kmeans=2, dither=Image.Dither.NONE)
        smaller = min(encoded, _encoded(few, format="PNG", optimize=True), key=len)
        if len(smaller) <= ENOUGH:
            break
    return smaller


def _scrub_picture(data):
    "Store a picture once, in few bytes: as JPEG where the notebook asks for it."
    if "image/jpeg" in data:
        data.pop("image/png", None)
    for kind in {"image/png", "image/jpeg"} & data.keys():
        if len(data[kind]) > LARGE:
            data[kind] = _smaller(data[kind], kind)


def scrub(nb):
    "Remove from fresh outputs what differs between runs or machines, and what is large for little."
    for cell in code_cells(nb):
        for output in cell.outputs:
            if output.output_type == "stream":
                _scrub_stream(output)
            _scrub_picture(output.get("data", {}))
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/") and isinstance(value, str):
                    value = _without_places(value)
                    # fastprogress: [00:03<00:00 ...]
                    output.data[kind] = re.sub(r"\[\d\d:\d\d&lt;\d\d:\d\d[^\]]*\]", "", value)
        cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.text.strip()]
    return nb


def figure_as_text(output):
    "Say whether an output is a figure that Jupyter did not draw: pyplot had not been used yet."
    data = output.get("data", {})
    return data.get("text/plain", "").startswith("<Figure ") and len(data) == 1


def faults(path):
    "Say what is wrong with a stored notebook; nothing if `run` would change nothing."
    try:
        nb = read(path)
        clean = tidy(nb)
    except Exception as e:
        return [f"not readable: {e}"]
    messages = []
    if (size := path.stat().st_size) > MAX_BYTES:
        messages.append(f"{size} bytes, more than {MAX_BYTES}")
    if nbformat.writes(clean) + "\n" != path.read_text(encoding="utf-8"):
        messages.append("not clean (execution counts, volatile metadata or foreign ids)")
    if any(o.output_type == "error" for cell in code_cells(nb) for o in cell.outputs):
        messages.append("stores an error output")
    if unseen := [cell.id for cell in code_cells(nb) if any(map(figure_as_text, cell.outputs))]:
        messages.append(f"shows the figure of cell {unseen[0]} as text: needs %matplotlib inline")
    return messages + (stale.reasons(clean, LIB, COMMANDS) if code_cells(nb) else [])


def check(paths):
    "Report the faults of stored notebooks; return the number of notebooks that have any."
    wrong = {path: messages for path in notebooks(paths) if (messages := faults(path))}
    for path, messages in wrong.items():
        for message in messages:
            print(f"{name(path)}: {message}")
    return len(wrong)


# ---------------------------------------------------------------- execution


def execute(path, also=()):
    "Run a notebook in a fresh kernel in its own folder; store the clean outputs with their stamp."
    from nbclient import NotebookClient

    nb = tidy(read(path))
    nb.metadata.pop("executed", None)
    for cell in code_cells(nb):
        if set(directives(cell)) & set(also):
            cell.metadata = {}
        if not cell.metadata:  # a cell that is left out keeps its outputs
            cell.outputs = []
    client = NotebookClient(
        nb,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
    )
    client.execute()
    nb = tidy(scrub(nb))
    nb.metadata["executed"] = stale.stamp(nb, LIB, COMMANDS)
    write(nb, path)


def run(paths, also=(), only_stale=False):
    "Execute notebooks one by one and store their outputs; return the number that failed."
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    os.environ.update(environment())
    failed, todo = 0, notebooks(paths)
    for path in todo:
        write(tidy(read(path)), path)
    save(exported(todo))  # the modules first, as one notebook may show another's
    for path in todo:
        if not code_cells(read(path)) or (only_stale and not faults(path)):
            continue
        start = time.time()
        try:
            execute(path, also)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            failed += 1
            seconds = f"{time.time() - start:.0f} s"
            print(f"FAILED {name(path)} after {seconds}\n{e}", file=sys.stderr, flush=True)
        else:
            size = path.stat().st_size // 1000
            print(f"stored {name(path)} in {time.time() - start:.0f} s ({size} kB)", flush=True)
    return failed


# ---------------------------------------------------------------- export


def modules(folder):
    "Read the Python files of a package: {path in it: text}."
    return {
        p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8")
        for p in folder.rglob("*.py")
        if p.name != INDEX
    }


def exported(paths=(), index=False):
    "Export notebooks in a copy, where a failure harms nothing: {path in the package: text}."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        inits = LIB.rglob("__init__.py")
        for path in (ROOT / "settings.ini", *inits, *notebooks(paths)):
            copy = tmp / name(path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # nbdev exports nothing then
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp, env=env, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"export failed\n{done.stdout}{done.stderr}")
        files = modules(tmp / PKG)
        if index:
            files[INDEX] = (tmp / PKG / INDEX).read_text(encoding="utf-8")
        return files


def save(files):
    "Write {path in the package: text}, only what changes."
    for file, text in files.items():
        path = LIB / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def export(check=False):
    "Export all notebooks, or only compare; return the number of modules that are wrong."
    if not check:
        for path in notebooks():
            write(tidy(read(path)), path)
    old, new = modules(LIB), exported()
    orphans = sorted(old.keys() - new.keys())
    for file in orphans:
        print(f"{PKG}/{file}: no notebook exports it")
    if not check:
        save(new)
        return len(orphans)
    differing = sorted(file for file, text in new.items() if old.get(file) != text)
    for file in differing:
        lines = (old.get(file, "").splitlines(), new[file].splitlines())
        heads = (f"{PKG}/{file}", "exported from its notebook")
        print("\n".join([*difflib.unified_diff(*lines, *heads, lineterm="", n=1)][:40]))
    return len(differing) + len(orphans)


# ---------------------------------------------------------------- README

PICTURES = f"{NBS.name}/images/readme-{{cell_index}}-{{index}}{{extension}}"
README = """\
{%- extends 'markdown/index.md.j2' -%}
{%- block input -%}
{%- if 'echo: false' not in cell.source %}

```python
{{ cell.source }}
```
{% endif -%}
{%- endblock -%}
{%- block stream -%}
{%- if output.name == 'stdout' %}

```
{{ output.text.strip() }}
```
{% endif -%}
{%- endblock -%}
{%- block data_text %}

```
{{ output.data['text/plain'].strip() }}
```
{% endblock -%}
{%- block data_png %}

![{{ cell.source | alternative }}]({{ output.metadata.filenames['image/png'] }})
{% endblock -%}
{%- block markdowncell %}

{{ cell.source | from_root }}
{% endblock -%}
"""


def _outside_code(pattern, new, text):
    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    return "".join(p if k % 2 else re.sub(pattern, new, p) for k, p in enumerate(parts))


def from_root(text):
    "Let the links of Markdown text in nbs/ lead to the same files from the root."
    link = r"(!?\[[^\]]*\]\(|<img[^>]*\bsrc=\")(?!https?:|#|/|mailto:|data:)([^)\s\"]+)"
    return _outside_code(link, lambda m: m[1] + os.path.normpath(f"{NBS.name}/{m[2]}"), text)


def alternative(source):
    "Return what a cell says of its picture in `#| fig-alt: ...`, for those who do not see it."
    return "".join(re.findall(r"(?m)^#\|\s*fig-alt:\s*(.+)$", source))


def readme_files():
    "Make README.md and its pictures of nbs/index.ipynb: {path from the root: content}."
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    hidden = [r"#\|\s*(hide|export|default_exp|include: false)"]
    config = dict(
        ExtractOutputPreprocessor=dict(output_filename_template=PICTURES),
        RegexRemovePreprocessor=dict(enabled=True, patterns=hidden),
    )
    filters = dict(from_root=from_root, alternative=alternative)
    exporter = MarkdownExporter(raw_template=README, filters=filters, config=Config(config))
    text, resources = exporter.from_notebook_node(read(NBS / "index.ipynb"))
    text = _outside_code(r"\n{3,}", "\n\n", text).strip()
    head = "<!-- Made from nbs/index.ipynb by tools/notebooks.py readme: edit the notebook. -->"
    return {"README.md": f"{head}\n\n{text}\n".encode(), **resources["outputs"]}


def readme(check=False):
    "Write README.md and its pictures, or only compare; return the number of files that differ."
    files = readme_files()
    stray = [p for p in (NBS / "images").glob("readme-*.png") if name(p) not in files]
    old = {file: (ROOT / file).read_bytes() for file in files if (ROOT / file).exists()}
    differing = [file for file, content in files.items() if old.get(file) != content]
    if check:
        for file in [*differing, *map(name, stray)]:
            print(f"{file}: not what nbs/index.ipynb makes; run tools/notebooks.py readme")
        return len(differing) + len(stray)
    for file in differing:
        (ROOT / file).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / file).write_bytes(files[file])
    for path in stray:
        path.unlink()
    return 0


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {
        command: commands.add_parser(command) for command in ("export", "run", "check", "readme")
    }
    for command in ("run", "check"):
        add[command].add_argument("paths", nargs="*", help="notebooks; default: all")
    for command in ("export", "readme"):
        add[command].add_argument("--check", action="store_true", help="only compare")
    add["run"].add_argument("--stale", action="store_true", help="only those that `check` faults")
    add["run"].add_argument(
        "--also", nargs="+", default=[], metavar="FLAG", help="cells to run too: cuda slow notest"
    )
    args = parser.parse_args(argv)
    if args.command == "run":
        return bool(run(args.paths, args.also, args.stale))
    if args.command == "check":
        return bool(check(args.paths))
    return bool((export if args.command == "export" else readme)(args.check))


if __name__ == "__main__":
    sys.exit(main())
