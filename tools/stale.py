"""Are a notebook's stored outputs those of the code as it is? Hashes of all that they depend on.

A notebook depends on its own cells, on the modules of the package that it reaches through imports,
on the data that ships with the package, and on the experiments' files that its code names.
`tools/notebooks.py run` stores a stamp of these in the notebook's metadata; its `check` and
tests/test_notebooks.py compare it. tests/test_project.py draws the import graph in the same way.
"""

import ast
import hashlib
import json
import re

WHY = dict(
    cells="its code cells changed since it was run",
    modules="a module that it imports changed since it was run",
    data="shipped weights, presets, assets or experiment files changed since it was run",
    outputs="its outputs are not those of its last whole run",
)


def digest(*parts):
    "Hash texts and bytes, with their borders, to 16 hexadecimal digits."
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else str(part).encode())
        h.update(b"\0")
    return h.hexdigest()[:16]


def without_comments(source):
    "Drop blank lines and lines that hold only a comment: they cannot change a result."
    lines = source.splitlines()
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))


# ---------------------------------------------------------------- what a source imports


def module_file(name, lib):
    "Return the file of the module `methods.ppo` or the package `methods` in `lib`, or None."
    path = lib.joinpath(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def module_names(lib):
    "List the modules of the package in `lib`; its sub-packages too where they hold code."
    names = []
    for file in sorted(lib.rglob("*.py")):
        parts = file.relative_to(lib).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1] if file.read_text(encoding="utf-8").strip() else ()
        if parts and not parts[-1].startswith("_"):
            names.append(".".join(parts))
    return names


def module_of(dotted, lib):
    "Return the module that `ddpo_scratch.methods.ppo.ppo_loss` lies in, `methods.ppo`, or None."
    parts = dotted.split(".")[1:]
    while parts and not module_file(".".join(parts), lib):
        parts.pop()
    return ".".join(parts) or None


def _docstrings(tree):
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, owners))
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def _import_from(node, here, package):
    "Return the dotted names that an import in the package `here` brings in."
    base = node.module or ""
    if node.level:
        parents = here.split(".")
        base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
    return {f"{base}.{alias.name}" for alias in node.names if base.split(".")[0] == package}


def mentioned(tree, here, package):
    "Collect the dotted names of `package` that are imported, or stand in a string of the code."
    names, prose = set(), _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= _import_from(node, here, package)
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.split(".")[0] == package}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in prose:
                names |= set(re.findall(rf"\b{package}(?:\.\w+)+", node.value))
    return names


def imported(source, lib, module=None):
    "List the other modules of `lib` that the source of a module, or of a script (None), mentions."
    package = lib.name
    here = package
    if module:
        is_package = module_file(module, lib).name == "__init__.py"
        here = f"{package}.{module}" if is_package else f"{package}.{module}".rpartition(".")[0]
    names = mentioned(ast.parse(source), here, package)
    return {module_of(name, lib) for name in names} - {None, module}


def cell_imports(source, lib, commands=()):
    "Do the same for a notebook's cell, with its shell lines, magics and `commands` {name: module}."
    from IPython.core.inputtransformer2 import TransformerManager

    called = {module for name, module in commands.items() if re.search(rf"\b{name}\b", source)}
    try:
        return called | imported(TransformerManager().transform_cell(source), lib)
    except SyntaxError:
        return called


def reached(names, lib):
    "Follow imports from `names` to every module that is run: {dotted name: source}."
    todo, sources = set(names), {}
    while todo:
        name = todo.pop()
        if name in sources:
            continue
        sources[name] = module_file(name, lib).read_text(encoding="utf-8")
        todo |= imported(sources[name], lib, name)
        package, _, last = name.rpartition(".")
        if package:
            todo.add(package)
        # methods, models and rewards find their neighbours at run time, by pkgutil
        if last == "base":
            todo |= {n for n in module_names(lib) if n.startswith(package + ".")}
    return sources


# ---------------------------------------------------------------- stamps


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def data_files(nb, lib):
    "List the package's data, and the files of experiments/ and benchmarks/ that the code names."
    files = {p for p in lib.rglob("*") if p.suffix != ".py"}
    for cell in code_cells(nb):
        for name in re.findall(r"\b(?:experiments|benchmarks)(?:/[\w.-]+)*", cell.source):
            path = lib.parent / name
            while not path.exists():
                path = path.parent
            if path != lib.parent:
                files |= set(path.rglob("*")) if path.is_dir() else {path}
    return sorted(p for p in files if p.is_file() and "__pycache__" not in p.parts)


def stamp(nb, lib, commands=()):
    "Hash what the outputs of the clean notebook `nb` come from, and the outputs."
    cells = code_cells(nb)
    names = set().union(*(cell_imports(cell.source, lib, commands) for cell in cells))
    modules = [f"{n} {without_comments(s)}" for n, s in sorted(reached(names, lib).items())]
    data = [(p.relative_to(lib.parent).as_posix(), p.read_bytes()) for p in data_files(nb, lib)]
    return dict(
        cells=digest(*(cell.source for cell in cells)),
        modules=digest(*modules),
        data=digest(*(part for pair in data for part in pair)),
        outputs=digest(json.dumps([cell.outputs for cell in cells], sort_keys=True)),
    )


def reasons(nb, lib, commands=()):
    "Say why the outputs of the clean notebook `nb` may be old; nothing if all is as it was."
    if not (old := nb.metadata.get("executed")):
        return ["its outputs carry no stamp: it was never run by this tool"]
    new = stamp(nb, lib, commands)
    return [why for key, why in WHY.items() if old.get(key) != new[key]]
