"""What the site says about names: an entry with its table of parameters, and the index of names.

nbdev's show_doc puts an entry before its exported source; `Entry` is what it writes there. What a
parameter means stands in the comment beside it (fastcore's docments).
"""

import ast
import dataclasses
import functools
import html
import importlib
import inspect
import re
import typing
from pathlib import Path

from fastcore.docments import docments


def field_groups(fields):
    "Return {group: those of the fields that are in it}, in the groups of the command's help."
    from ddpo_scratch.cli.commands import GROUPS

    groups = {group: [n for n in names if n in fields] for group, names in GROUPS.items()}
    known = {name for names in groups.values() for name in names}
    if lost := [name for name in fields if name not in known]:
        raise ValueError(
            f"TrainConfig: {', '.join(lost)}: in no group of ddpo_scratch.cli.commands.GROUPS"
        )
    return {group.capitalize(): names for group, names in groups.items() if names}


# ---------------------------------------------------------------- words


def inline(text):
    "Write a comment's or docstring's words as HTML: names in backticks are code."
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text or "", quote=False))


def _bounds(annotation):
    "Put in words what pydantic asks of a number or text."
    for mark in typing.get_args(annotation)[1:]:
        if words := getattr(mark, "description", None):
            return words
        limits = [("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")]
        for name, words in limits:
            limit = getattr(mark, name, None)
            # of 64 bits, say, is a bound of the machine and not of the field
            if limit is not None and abs(limit) < 2**53:
                # of whole numbers, above 0 is at least 1
                whole = name == "gt" and typing.get_args(annotation)[0] is int
                return f"at least {limit + 1}" if whole else f"{words} {limit:g}"
    return ""


def type_words(annotation):
    'Name a type as a reader says it: `int, at least 1`, `"no" | "bf16"`, `Tensor`.'
    if annotation is inspect.Parameter.empty or annotation is type(None):
        return ""
    if hasattr(annotation, "__metadata__"):
        kind, bounds = type_words(typing.get_args(annotation)[0]), _bounds(annotation)
        return f"{kind}, {bounds}" if bounds else kind
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(f'"{choice}"' for choice in typing.get_args(annotation))
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    # a class of any module goes by its own name
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", text).replace("NoneType", "None")


def default_words(value):
    "Write a default as one types it."
    if value is inspect.Parameter.empty or value is dataclasses.MISSING:
        return ""
    named = getattr(value, "__name__", None)
    text = named or (f"{value:g}" if isinstance(value, float) else repr(value))
    return text if len(text) <= 60 else f"{type(value).__name__}(…)"


# ---------------------------------------------------------------- tables


def code(text):
    "Write a text as code; nothing of an empty one."
    return f"<code>{html.escape(text, quote=False)}</code>" if text else ""


def row(name, kind, default, what):
    "Write a line of a table of parameters."
    cells = "".join(f"<td>{code(text)}</td>" for text in (name, kind, default))
    return f"<tr>{cells}<td>{inline(what)}</td></tr>"


def table(rows, caption=""):
    "Write a table of parameters, fields or results."
    head = "<tr><th>name</th><th>type</th><th>default</th><th>what</th></tr>"
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = "\n".join(rows)
    return (
        f'<div class="sd-table"><table class="table params">{title}<thead>{head}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def inherited(symbol):
    "Say whether a class is made as its foreign parent is: an exception, or torch's Module."
    if not inspect.isclass(symbol):
        return False
    python = inspect.isfunction(symbol.__init__)
    return not python or symbol.__init__.__module__.split(".")[0] == "torch"


def parameters(symbol):
    "Return the rows of a function's or record's parameters, and the row of what it returns."
    if inherited(symbol):
        return {}, ""
    told = docments(symbol, full=True, args_kwargs=True)
    returned = told.pop("return", None)
    annotated = _annotations(symbol)
    rows = {}
    for name, parameter in told.items():
        if name == "self":
            continue
        kind = type_words(annotated.get(name, inspect.Parameter.empty))
        default = default_words(parameter["default"])
        what = " ".join((parameter["docment"] or "").split())
        rows[name] = row(STARS.get(parameter["kind"], "") + name, kind, default, what)
    last = ""
    if returned and not inspect.isclass(symbol) and "return" in annotated:
        kind = type_words(annotated["return"]) or "None"
        last = (
            f'<tr class="returns"><td><strong>returns</strong></td><td>{code(kind)}</td>'
            f"<td></td><td>{inline(returned['docment'])}</td></tr>"
        )
    return rows, last


def _annotations(symbol):
    "Return the types of a function's or class's parameters; where none is said, a default's type."
    signature = inspect.signature(symbol)
    kinds = {}
    for name, parameter in signature.parameters.items():
        silent = parameter.annotation is inspect.Parameter.empty
        simple = isinstance(parameter.default, (bool, int, float, str, tuple))
        kinds[name] = type(parameter.default) if silent and simple else parameter.annotation
    if signature.return_annotation is not inspect.Signature.empty:
        kinds["return"] = signature.return_annotation
    return kinds


def grouped(rows):
    "Write TrainConfig's rows as a table for each group."
    groups = field_groups(list(rows)).items()
    return "\n".join(table([rows[name] for name in names], group) for group, names in groups)


def methods(symbol):
    "Return the rows of a class's public methods and properties: name, result, one line."
    rows = []
    for name, member in vars(symbol).items():
        function = getattr(member, "fget", None) or getattr(member, "func", None) or member
        function = getattr(function, "__func__", function)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        kind = _annotations(function).get("return", inspect.Parameter.empty)
        call = name if isinstance(member, (property, functools.cached_property)) else f"{name}()"
        rows.append((call, type_words(kind), first_line(function)))
    return rows


def methods_table(symbol):
    "Write the table of a class's methods; nothing where it has none."
    rows = [
        f"<tr><td>{code(name)}</td><td>{code(kind)}</td><td>{inline(what)}</td></tr>"
        for name, kind, what in methods(symbol)
    ]
    if not rows:
        return ""
    head = "<tr><th>method</th><th>returns</th><th>what</th></tr>"
    return (
        '<div class="sd-table"><table class="table params methods">'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def first_line(symbol):
    "Return the first line of a docstring; nothing of one that dataclasses or object made."
    text = inspect.cleandoc(symbol.__doc__ or "")
    made = inspect.isclass(symbol) and text.startswith(f"{symbol.__name__}(")
    return "" if made or not text else text.splitlines()[0]


def signature(symbol, name):
    "Write how a thing is called: `fit(config=None, on_epoch=None, **parts)`."
    if inherited(symbol):
        return f"{name}()"
    parts, starred = [], False
    for parameter in inspect.signature(symbol).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        default = default_words(parameter.default)
        star = STARS.get(parameter.kind, "")
        parts.append(f"{star}{parameter.name}" + (f"={default}" if default else ""))
    return f"{name}({', '.join(parts)})"


class Entry:
    "What show_doc writes of a name: heading, call, docstring, parameters with the return, methods."

    # the module that the notebook exports: a class made in a kernel has no file with comments
    home = None

    def __init__(self, symbol, name=None, title_level=3):
        self.level = title_level
        self.name = name or getattr(symbol, "__qualname__", type(symbol).__name__)
        self.symbol = getattr(self.home, self.name, symbol)

    def html(self):
        "Write the entry below its heading."
        rows, last = parameters(self.symbol)
        many = len(rows) > 12
        doc = inspect.cleandoc(self.symbol.__doc__ or "") if first_line(self.symbol) else ""
        kind = "class" if inspect.isclass(self.symbol) else "function"
        call = f"{self.name}(…)" if many else signature(self.symbol, self.name)
        parts = [f'<p class="call"><span>{kind}</span> <code>{html.escape(call)}</code></p>']
        parts += [f"<p>{inline(text)}</p>" for text in doc.split("\n\n") if text]
        if self.name == "TrainConfig":
            parts.append(grouped(rows))
        elif rows or last:
            parts.append(table([*rows.values(), *([last] if last else [])]))
        if inspect.isclass(self.symbol):
            parts.append(methods_table(self.symbol))
        return "\n".join(filter(None, parts))

    def _repr_markdown_(self):
        "Write the entry as Markdown: a heading for the contents, and HTML that nothing rewrites."
        heading = f"{'#' * self.level} {self.name} {{#{self.name} .api}}"
        return f"{heading}\n\n```{{=html}}\n{self.html()}\n```\n"


# ---------------------------------------------------------------- the index of names


def constants(source):
    "Return the public constants of a module's source with the comment above or beside each."
    tree, lines = ast.parse(source), source.splitlines()
    public = set()
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        if name == "__all__":
            public = set(ast.literal_eval(node.value))
            continue
        beside = lines[node.end_lineno - 1].partition("  # ")[2]
        above, k = [], node.lineno - 2
        while k >= 0 and lines[k].startswith("# ") and not lines[k].startswith("# %%"):
            above.insert(0, lines[k][2:])
            k -= 1
        found[name] = beside or " ".join(above)
    return {name: what for name, what in found.items() if name in public}


def contents(value):
    "Say what is in a constant that has no comment, as far as a line goes."
    if type(value).__repr__ is object.__repr__:
        return first_line(type(value))
    name = type(value).__name__
    kind = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    if not isinstance(value, (dict, list, tuple)):
        return f"{kind}: {value}"
    kept = list(map(str, value))
    while len(", ".join(kept)) > 80:
        kept.pop()
    more = ", …" if len(kept) < len(value) else ""
    return f"{kind}: {', '.join(kept)}{more}"


def described(module):
    "Return {public name: (one line, is it a constant)} of an imported module."
    told = constants(Path(module.__file__).read_text(encoding="utf-8"))
    lines = {}
    for name in module.__all__:
        symbol = getattr(module, name)
        defined = inspect.isclass(symbol) or inspect.isroutine(symbol)
        words = first_line(symbol) if defined else told.get(name) or contents(symbol)
        lines[name] = (words, not defined)
    return lines


def names(package, pages):
    "Yield each public name with its module, its place in the site and one line about it."
    for module, page in pages.items():
        lines = described(importlib.import_module(f"{package}.{module}"))
        for name, (what, constant) in lines.items():
            yield name, module, page if constant else f"{page}#{name}", what


def index_page(package, pages):
    "Write the index of names as a page: every public name, its module, one line, a link."
    rows = sorted(names(package, pages), key=lambda r: (r[0].lower(), r[1]))
    body = "\n".join(
        f'<tr><td><a href="{href}"><code>{html.escape(name)}</code></a></td>'
        f"<td><code>{module}</code></td><td>{inline(what)}</td></tr>"
        for name, module, href, what in rows
    )
    head = "<tr><th>name</th><th>module</th><th>what</th></tr>"
    return (
        "---\ntitle: Index of names\n"
        f"description: The {len(rows)} public names of {package}, in alphabetical order\n---\n\n"
        '```{=html}\n<div class="sd-table"><table class="table names">'
        f"<thead>{head}</thead>\n<tbody>{body}</tbody></table></div>\n```\n"
    )
