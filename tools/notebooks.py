#!/usr/bin/env python
"""Notebooks: export them, run them, keep their outputs honest, make README.md from index.ipynb.

    python tools/notebooks.py export [--check]              notebooks -> ddpo_scratch/*.py
    python tools/notebooks.py run [--stale] [notebooks]     execute and store the outputs
    python tools/notebooks.py test [notebooks]              execute, store nothing
    python tools/notebooks.py check [notebooks]             are the stored outputs from the code as it is?
    python tools/notebooks.py readme [--check]              nbs/index.ipynb -> README.md
"""
import argparse, ast, base64, difflib, hashlib, json, os, re, shutil, subprocess, sys, tempfile, time
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
_ini = ConfigParser()
_ini.read(ROOT / "settings.ini", encoding="utf-8")
CFG = _ini["DEFAULT"]
NBS, LIB = ROOT / CFG["nbs_path"], ROOT / CFG["lib_path"]
PKG = LIB.name
INDEX = "_modidx.py"  # nbdev's list of names and pages: made for the site, not kept, as each notebook would change it
MAX_BYTES = 500_000  # of a notebook, outputs included


def notebooks(paths=()):
    "The notebooks at `paths`, by default all of them, in reading order: index first."
    if paths:
        found = [Path(p).resolve() for p in paths]
        if missing := [p for p in found if not p.is_file() or p.suffix != ".ipynb"]:
            sys.exit(f"not a notebook: {', '.join(map(str, missing))}")
        return found
    found = [p for p in NBS.rglob("*.ipynb") if not any(q[0] in "._" for q in p.relative_to(NBS).parts)]
    return sorted(found, key=lambda p: (p.stem != "index", p.as_posix()))


def name(path): return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def read(path): return nbformat.read(path, as_version=4)


def write(nb, path):
    text = nbformat.writes(nb) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8")


def code_cells(nb): return [c for c in nb.cells if c.cell_type == "code"]


def directives(cell): return [m[1].strip() for m in re.finditer(r"^[ \t]*#\|(.*)$", cell.source, re.M)]


def skipped(cell, also=()):
    "Is this a cell that is not executed: `#| eval: false`, or flagged as in tst_flags (less those in `also`)?"
    flags = set(CFG["tst_flags"].split()) - set(also)
    return any(d in flags or re.fullmatch(r"eval:\s*false", d, re.I) for d in directives(cell))


# ---------------------------------------------------------------- clean form

def tidy(nb):
    "Bring `nb` to the one form that is committed: nbdev_clean's, with ids that follow from the cells' text."
    from nbdev.clean import clean_nb
    nb = nbformat.from_dict(nb)
    for c in code_cells(nb):
        for o in c.outputs:
            o.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if "metadata" in o: o.metadata = {}
    clean_nb(nb, allowed_metadata_keys=CFG["allowed_metadata_keys"].split())
    keep = {k: nb.metadata[k] for k in ("executed",) if k in nb.metadata}
    nb.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}, **keep})
    seen = {}
    for c in nb.cells:
        key = hashlib.sha256(c.source.encode()).hexdigest()[:8]
        seen[key] = seen.get(key, 0) + 1
        c.id = key if seen[key] == 1 else f"{key}-{seen[key]}"
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nbformat.from_dict(nb)


_bars = re.compile(r"\d+%\||\d(?:it|s)/(?:it|s)\b|\bit/s\b")  # what tqdm prints


def scrub(nb):
    "Remove from fresh outputs what differs between two runs or two machines: progress bars, paths."
    places = [(str(ROOT) + "/", ""), (sys.prefix + "/", ""), (str(Path.home()) + "/", "~/")]
    def clean(text):
        for a, b in places: text = text.replace(a, b)
        return text
    for c in code_cells(nb):
        for o in list(c.outputs):
            if o.output_type == "stream":
                lines = [l.rsplit("\r", 1)[-1] for l in clean(o.text).split("\n")]
                o.text = "\n".join(l for l in lines if not (o.name == "stderr" and _bars.search(l)))
                if not o.text.strip(): c.outputs.remove(o)
            for k, v in o.get("data", {}).items():
                if k.startswith("text/") and isinstance(v, str):
                    o.data[k] = re.sub(r"\[\d\d:\d\d&lt;\d\d:\d\d[^\]]*\]", "", clean(v))
    return nb


# ---------------------------------------------------------------- what outputs depend on

def digest(*parts):
    h = hashlib.sha256()
    for p in parts: h.update(p if isinstance(p, bytes) else str(p).encode()); h.update(b"\0")
    return h.hexdigest()[:16]


def python_text(source):
    "Source without blank and comment lines: what cannot change a result."
    return "\n".join(l for l in source.splitlines() if l.strip() and not l.lstrip().startswith("#"))


def imported(source, package=""):
    "Names of the project's modules that `source` imports, anywhere in it; `package` resolves relative imports."
    found, text = set(), source
    if not package:  # a cell: shell lines and magics may name modules and commands
        found |= set(re.findall(rf"\b{PKG}\.([a-z]\w*)", source))
        if re.search(r"\bddpo_(?:train|sample)\b", source): found.add("cli")
        text = "\n".join(re.sub(r"\S.*", "pass", l) if re.match(r"\s*[%!]", l) else l for l in source.splitlines())
    try: tree = ast.parse(text)
    except SyntaxError:  # a cell magic: what the pattern found must do
        if package: raise
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            mod = f"{package}.{node.module or ''}".strip(".") if node.level else node.module or ""
            if mod == PKG: found |= {a.name for a in node.names}
            elif mod.startswith(PKG + "."): found.add(mod.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith(PKG + ".")}
    return found


def modules(nb):
    "Every module of the project that the notebook's code reaches through imports."
    todo, done = {m for c in code_cells(nb) for m in imported(c.source)}, {}
    while todo:
        m = todo.pop()
        path = LIB / f"{m}.py"
        if m in done or not path.is_file(): continue
        done[m] = path.read_text(encoding="utf-8")
        todo |= imported(python_text(done[m]), PKG)
    return done


def data_files(nb):
    "Shipped weights and assets, and the files under experiments/ and benchmarks/ that the notebook's code names."
    found = {p for d in ("tiny_model", "assets") for p in (LIB / d).rglob("*")}
    for c in code_cells(nb):
        for m in re.findall(r"\b(?:experiments|benchmarks)(?:/[\w.-]+)*", c.source):
            p = ROOT / m
            while not p.exists() and p != ROOT: p = p.parent
            if p != ROOT: found |= set(p.rglob("*")) if p.is_dir() else {p}
    return sorted(p for p in found if p.is_file() and "__pycache__" not in p.parts)


def stamp(nb):
    "Hashes of what the outputs come from, and of the outputs: kept in the notebook's metadata."
    outputs = [c.outputs for c in code_cells(tidy(nb))]
    return dict(cells=digest(*[c.source for c in code_cells(nb)]),
                modules=digest(*[f"{m} {python_text(s)}" for m, s in sorted(modules(nb).items())]),
                data=digest(*[x for p in data_files(nb) for x in (name(p), p.read_bytes())]),
                outputs=digest(json.dumps(outputs, sort_keys=True)))


WHY = dict(cells="its code cells changed since it was run", modules="a module that it imports changed since it was run",
           data="shipped weights, assets or experiment files that it shows changed since it was run",
           outputs="its outputs are not those of its last whole run")


def faults(path):
    "What is wrong with the stored notebook; nothing if it is as `run` left it and all it depends on is unchanged."
    try: nb = read(path)
    except Exception as e: return [f"not readable: {e}"]
    found = []
    if (size := path.stat().st_size) > MAX_BYTES: found.append(f"{size} bytes, more than {MAX_BYTES}")
    if nbformat.writes(tidy(nb)) + "\n" != path.read_text(encoding="utf-8"):
        found.append("not clean (execution counts, volatile metadata or foreign ids)")
    if any(o.output_type == "error" for c in code_cells(nb) for o in c.outputs): found.append("stores an error output")
    if not code_cells(nb): return found
    if not (old := nb.metadata.get("executed")): return found + ["never run by this tool: no hashes stored"]
    new = stamp(nb)
    return found + [why for key, why in WHY.items() if old.get(key) != new[key]]


# ---------------------------------------------------------------- execution

def execute(nb, also=()):
    "Run every cell of `nb` in order in a fresh kernel, in nbs/; raises CellExecutionError."
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, *args, **kwargs):
            return cell if skipped(cell, also) else await super().async_execute_cell(cell, *args, **kwargs)

    env = dict(os.environ, PYTHONHASHSEED="0", PYTHONPATH=os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    env.setdefault("HF_HUB_OFFLINE", "1")
    env.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm asks for widgets that nothing here needs
    env.setdefault("WANDB_MODE", "disabled")
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, not another of the same name
    client = Client(nb, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(NBS)}},
                    record_timing=False, coalesce_streams=True,
                    extra_arguments=["--IPKernelApp.log_level=40"])  # errors only
    client.execute(env=env)
    return nb


def run(paths, store, also=(), only_stale=False):
    "Execute notebooks one after another, each in a kernel of its own; returns the number that failed."
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    failed, todo = 0, notebooks(paths)
    if store:  # first the modules, as a notebook may show another's; their headers carry the cells' final ids
        for path in todo: write(tidy(read(path)), path)
        save(exported(todo))
    for path in todo:
        if only_stale and not faults(path): continue
        nb, start = tidy(read(path)), time.time()
        if store:
            nb.metadata.pop("executed", None)
            for c in code_cells(nb):
                if not skipped(c, also): c.outputs = []
        try:
            if code_cells(nb): execute(nb, also)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            failed += 1
            print(f"FAILED {name(path)} after {time.time() - start:.0f} s\n{e}", file=sys.stderr, flush=True)
            continue
        if store:
            nb = tidy(scrub(nb))
            if code_cells(nb): nb.metadata["executed"] = stamp(nb)
            write(nb, path)
        print(f"{'stored' if store else 'ran'} {name(path)} in {time.time() - start:.0f} s"
              f" ({path.stat().st_size // 1000} kB)", flush=True)
    return failed


# ---------------------------------------------------------------- export

def exported(paths=()):
    "What nbdev exports from the notebooks, made in a clean copy: {file in the package: text}."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp / PKG).mkdir()
        shutil.copy(ROOT / "settings.ini", tmp)
        shutil.copy(LIB / "__init__.py", tmp / PKG)
        for p in notebooks(paths):
            (dst := tmp / name(p)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, dst)
        if not (tmp / NBS.name).exists(): return {}
        code = "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp, env=env, capture_output=True, text=True)
        if done.returncode: raise SystemExit(f"export failed\n{done.stdout}{done.stderr}")
        return {p.relative_to(tmp / PKG).as_posix(): p.read_text(encoding="utf-8") for p in (tmp / PKG).rglob("*.py")}


def save(files):
    for f, text in files.items():
        if f == INDEX: continue
        path = LIB / f
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text: path.write_text(text, encoding="utf-8")


def export(check):
    "Export all notebooks; with `check` only compare. Returns the number of differences."
    if not check:
        for p in notebooks(): write(tidy(read(p)), p)
    fresh, wrong = exported(), 0
    orphans = {p.relative_to(LIB).as_posix() for p in LIB.rglob("*.py")} - set(fresh)
    fresh.pop(INDEX, None)
    for f in sorted(orphans):
        print(f"{PKG}/{f}: no notebook exports it")
    if not check: save(fresh)
    else:
        for f, text in sorted(fresh.items()):
            old = (LIB / f).read_text(encoding="utf-8") if (LIB / f).exists() else ""
            if diff := list(difflib.unified_diff(old.splitlines(), text.splitlines(),
                                                 f"{PKG}/{f}", "exported from its notebook", lineterm="", n=1)):
                wrong += 1
                print("\n".join(diff[:40]))
    return wrong + len(orphans)


# ---------------------------------------------------------------- README

_link = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|#|/|mailto:|data:)([^)\s]+)(\))|(<img[^>]*\bsrc=\")(?!https?:|/|data:)([^\"]+)(\")")


def _relink(m):
    a, path, b = m.groups()[:3] if m[1] else m.groups()[3:]
    return a + os.path.normpath(os.path.join(NBS.name, path)) + b


def readme_files():
    "README.md and its pictures from nbs/index.ipynb: {path from the root: content}."
    out, files = ["<!-- Made from nbs/index.ipynb by tools/notebooks.py readme: edit the notebook. -->"], {}
    for c in read(NBS / "index.ipynb").cells:
        ds = directives(c)
        if c.cell_type == "markdown":
            text = "\n".join(l for l in c.source.splitlines() if not l.startswith(":::"))
            parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)  # no links are rewritten in code
            out.append("".join(p if i % 2 else _link.sub(_relink, p) for i, p in enumerate(parts)))
        elif c.cell_type == "code" and not any(d in ("hide", "export", "exporti") or d.startswith("default_exp")
                                               or re.fullmatch(r"include:\s*false", d) for d in ds):
            source = re.sub(r"^[ \t]*#\|.*\n?", "", c.source, flags=re.M).strip()
            if source and not any(re.fullmatch(r"echo:\s*false", d) for d in ds): out.append(f"```python\n{source}\n```")
            for o in c.outputs:
                data = o.get("data", {})
                if o.output_type == "stream" and o.name == "stdout" and o.text.strip():
                    out.append(f"```\n{o.text.strip()}\n```")
                elif "image/png" in data:
                    png = base64.b64decode(data["image/png"])
                    file = f"{NBS.name}/images/readme-{sum(f.endswith('.png') for f in files) + 1}.png"
                    files[file] = png
                    out.append(f"![]({file})")
                elif "text/markdown" in data: out.append(_link.sub(_relink, data["text/markdown"].strip()))
                elif (text := data.get("text/plain", "").strip()) and not re.match(r"<|None$", text):
                    out.append(f"```\n{text}\n```")
    files["README.md"] = ("\n\n".join(s.strip("\n") for s in out if s.strip()) + "\n").encode()
    return files


def readme(check):
    "Write README.md; with `check` only compare. Returns the number of files that differ."
    wrong, files = 0, readme_files()
    stray = [p for p in (NBS / "images").glob("readme-*.png") if name(p) not in files]
    for f, content in files.items():
        path = ROOT / f
        if path.exists() and path.read_bytes() == content: continue
        wrong += 1
        if check: print(f"{f}: not what nbs/index.ipynb makes; run tools/notebooks.py readme")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for p in stray:
        if check: print(f"{name(p)}: no longer in nbs/index.ipynb")
        else: p.unlink()
    return wrong + len(stray)


def check(paths):
    "Report faults of stored notebooks; returns the number of notebooks that have any."
    wrong = 0
    for path in notebooks(paths):
        found = faults(path)
        wrong += bool(found)
        for f in found: print(f"{name(path)}: {f}")
    return wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="command", required=True)
    for command in ("run", "test", "check"):
        p = sub.add_parser(command)
        p.add_argument("paths", nargs="*", help="notebooks; default: all")
        if command != "check":
            p.add_argument("--also", nargs="+", default=[], metavar="FLAG", help="run cells with these flags too: cuda slow notest")
        if command == "run": p.add_argument("--stale", action="store_true", help="only the notebooks that `check` faults")
    for command in ("export", "readme"):
        sub.add_parser(command).add_argument("--check", action="store_true", help="change nothing, exit 1 on a difference")
    a = parser.parse_args(argv)
    if a.command in ("run", "test"): return bool(run(a.paths, a.command == "run", a.also, getattr(a, "stale", False)))
    if a.command == "check": return bool(check(a.paths))
    if a.command == "export": return bool(export(a.check)) and a.check
    return bool(readme(a.check)) and a.check


if __name__ == "__main__": sys.exit(main())
