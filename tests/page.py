"""The rules of this project's pages, as functions that list the faults of what they are given.

tests/test_project.py holds the project to them, and shows on planted faults that each can fail.
"""

import ast
import inspect
import statistics
import subprocess
import sys
from pathlib import Path

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import stale  # noqa: E402

LIMIT = 100  # columns
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def ruff(*args, stdin=None):
    "Run ruff with the project's configuration."
    command = [sys.executable, "-m", "ruff", *args, "--no-cache"]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True)


# ---------------------------------------------------------------- lines and lengths


def hand_written(source):
    "Blank what nbdev lays out in a module: its docstring (a notebook's subtitle) and __all__."
    lines, tree = source.splitlines(), ast.parse(source)
    made = [node for node in tree.body if "__all__" in ast.unparse(node).partition("=")[0]]
    if ast.get_docstring(tree) is not None:
        made.append(tree.body[0])
    for node in made:
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines) + "\n"


def long_lines(source):
    "List the lines that are too long, by their numbers."
    lines = enumerate(source.splitlines(), 1)
    return [f"line {k} has {len(line)} columns" for k, line in lines if len(line) > LIMIT]


def formatted(source):
    "Return what `ruff format` makes of a module."
    done = ruff("format", "-", stdin=source)
    assert done.returncode == 0, done.stderr
    return done.stdout


def growth(sources):
    "Return by what factor `ruff format` makes sources longer, blank lines not counted."

    def count(source):
        return sum(bool(line.strip()) for line in source.splitlines())

    return sum(count(formatted(s)) for s in sources) / sum(count(s) for s in sources)


def function_lengths(source):
    "Return how many lines each function has after `ruff format`: {name: lines}."
    nodes = ast.walk(ast.parse(formatted(source)))
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    return {f"{f.name}, line {f.lineno}": f.end_lineno - f.lineno + 1 for f in functions}


def length_faults(lengths, median=8, longest=45):
    "List the functions that are too long, and say if they are shredded, of {name: lines}."
    faults = [f"{name}: {n} lines" for name, n in lengths.items() if n > longest]
    if lengths and (middle := statistics.median(lengths.values())) < median:
        faults.append(f"the median function has {middle:g} lines")
    return faults


# ---------------------------------------------------------------- rooms


def rooms(lib):
    "Return which modules each module knows, by imports and by names in strings: {name: names}."
    modules, graph = stale.module_names(lib), {}

    def whole(name, here):
        if name in modules:
            return name
        # a folder that is searched at run time
        return here if here.startswith(f"{name}.") else f"{name}.base"

    for module in modules:
        source = stale.module_file(module, lib).read_text(encoding="utf-8")
        known = {whole(name, module) for name in stale.imported(source, lib, module)}
        graph[module] = known - {module}
    return graph


def houses(graph):
    "Return the graph of top-level rooms: a module, or a folder with all that is in it."
    houses = {}
    for room, known in graph.items():
        top = room.split(".")[0]
        houses.setdefault(top, set()).update(name.split(".")[0] for name in known)
    return {name: known - {name} for name, known in houses.items()}


def circle(graph):
    "Return the rooms that lie on circles or lead into one; none if the graph has no circle."
    graph = dict(graph)
    while free := [room for room, known in graph.items() if not known & graph.keys()]:
        for room in free:
            del graph[room]
    return sorted(graph)


def graph_faults(graph, most=45, most_of_train=7):
    "List what is wrong with the arrows between rooms."
    faults = [f"a circle among {', '.join(rooms)}"] if (rooms := circle(graph)) else []
    top = houses(graph)
    arrows = [f"{room} -> {', '.join(sorted(known))}" for room, known in sorted(top.items())]
    if (count := sum(map(len, top.values()))) > most:
        faults.append(f"{count} arrows, more than {most}:\n" + "\n".join(arrows))
    if len(known := top.get("train", ())) > most_of_train:
        faults.append(f"train knows {len(known)} rooms: {', '.join(sorted(known))}")
    return faults


# ---------------------------------------------------------------- words


def words(source, word):
    "List the lines that hold a word, in names, strings or comments."
    lines = enumerate(source.splitlines(), 1)
    return [f"line {k}: {line.strip()}" for k, line in lines if word in line.lower()]


def _constants(node):
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}


def comparisons(source, names):
    "List where a source compares something with one of `names`, or matches it."
    faults = []
    for node in ast.walk(ast.parse(source)):
        sides = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            sides = [case.pattern for case in node.cases]
        constants = set().union(*map(_constants, sides)) if sides else set()
        if hit := sorted(constants & set(names), key=str):
            faults.append(f"line {node.lineno} compares with {', '.join(hit)}")
    return faults


# ---------------------------------------------------------------- documentation


def public_names(source):
    "Return the names in a module's __all__."
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def _own(function, module):
    "Say whether a function was written in the module, and not made or imported."
    return inspect.isfunction(function) and function.__code__.co_filename == module.__file__


def public_functions(module):
    "Return the functions that the module exports: {name: function}."
    values = {name: inspect.unwrap(getattr(module, name)) for name in module.__all__}
    return {name: value for name, value in values.items() if _own(value, module)}


def public_methods(module):
    "Return the public methods and properties of classes that the module exports: {name: function}."
    methods = {}
    for cls in filter(inspect.isclass, (getattr(module, name) for name in module.__all__)):
        for name, value in vars(cls).items():
            value = inspect.unwrap(getattr(value, "fget", getattr(value, "__func__", value)))
            if not name.startswith("_") and _own(value, module):
                methods[f"{cls.__name__}.{name}"] = value
    return methods


def _tree(function):
    import textwrap

    return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]


def _outer(node):
    "Walk a function's statements, and not those of functions inside it."
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
            yield child
            yield from _outer(child)


def gives(function):
    "Say whether a function returns or yields something."
    gifts = (ast.Return, ast.Yield, ast.YieldFrom)
    values = (node.value for node in _outer(_tree(function)) if isinstance(node, gifts))
    return any(v is not None and ast.unparse(v) != "None" for v in values)


def return_faults(functions):
    "List the functions whose return nbdev's docments do not find; `-> None` needs no comment."
    faults = []
    for name, function in functions.items():
        nothing = inspect.signature(function).return_annotation in (None, "None")
        if gives(function) and not nothing and not docments(function, full=True)["return"].docment:
            faults.append(f"{name}: no `-> Type:  # meaning`")
    return faults


def annotation_faults(functions):
    "List the functions with an annotation in quotes that names nothing: show_doc fails on them."
    faults = []
    for name, function in functions.items():
        try:
            inspect.signature(function, eval_str=True)
        except NameError as e:
            faults.append(f"{name}: {e}")
    return faults


def parameter_faults(functions):
    "List the parameters without a comment beside them, or that share a line with another one."
    faults = []
    for name, function in functions.items():
        told, arguments = docments(function, full=True), _tree(function).args
        plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        lines = [a.lineno for a in (*plain, arguments.vararg, arguments.kwarg) if a]
        if len(set(lines)) < len(lines):
            faults.append(f"{name}: several parameters on a line")
        # docments do not read the comment of **fields
        if silent := [a.arg for a in plain if a.arg != "self" and not told[a.arg].docment]:
            faults.append(f"{name}: no comment beside {', '.join(silent)}")
    return faults
