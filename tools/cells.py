"""Bring a notebook's cells, as nbdev processed them, into the form in which the site shows them.

Exported source is folded below its entry, with the private helpers that stand beside it; so are
cells that only check, import or help to draw. Formulas and links that the renderer misreads are
written so that it does not.
"""

import ast
import re

CHECKS = re.compile(r"(?:test_|assert_|check_)\w*$|assert_close$")


def folded(source, summary, open_=False):
    "Return a cell's source with the options that fold it."
    options = f'#| code-fold: {"show" if open_ else "true"}\n#| code-summary: "{summary}"\n'
    return options + source


def code_of(source):
    "Return a cell's source without its `#|` options."
    return re.sub(r"(?m)^\s*#\|.*\n?", "", source).strip("\n")


# ---------------------------------------------------------------- cells that are folded


def checks(node):
    "Say whether a statement only checks."
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        function = node.value.func
        return bool(CHECKS.match(getattr(function, "attr", getattr(function, "id", ""))))
    if isinstance(node, (ast.For, ast.With)):
        return all(map(checks, node.body))
    return False


def _draws(node):
    "Say whether a definition is about matplotlib."
    source = ast.unparse(node)
    return "plt." in source or "imshow" in source


def _catches(node):
    "Say whether a function only turns an error into words."
    return any(isinstance(n, ast.Try) for n in ast.walk(node)) and len(node.body) <= 6


def summary_of(source, outputs):
    "Name what a cell is folded as; nothing for a cell that stays open."
    if "code-fold" in source:
        return ""
    try:
        tree = ast.parse(code_of(source)).body
    except SyntaxError:
        return ""
    if not tree:
        return ""
    if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree):
        return "imports"
    if all(map(checks, tree)) and not outputs:
        return "checks"
    if all(isinstance(node, ast.FunctionDef) for node in tree):
        if all(node.name.startswith("check") for node in tree):
            return "how an answer is checked"
        if all(map(_draws, tree)):
            return "how it is drawn"
        if all(map(_catches, tree)):
            return "a helper that shows an error's text"
    return ""


# ---------------------------------------------------------------- entries and their source


def is_entry(cell):
    "Say whether a cell is a call of show_doc."
    return cell.cell_type == "code" and bool(re.search(r"(?m)^show_doc\(", cell.source))


def is_exported(cell):
    "Say whether a cell is exported source that nbdev shows."
    return cell.cell_type == "code" and 'code-summary: "Exported source"' in cell.source


def defined(source):
    "List the names that a cell defines, in order."
    nodes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = []
    for node in ast.parse(code_of(source)).body:
        if isinstance(node, nodes):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return names


def _together(run):
    "Put a run of entries and exported source in order: entries, then all the source in one fold."
    entries = [cell for cell in run if is_entry(cell)]
    sources = [cell for cell in run if is_exported(cell)]
    if not sources:
        return entries
    code = "\n\n\n".join(code_of(cell.source) for cell in sources)
    names = defined(code)

    def place(cell):
        name = re.search(r"show_doc\((\w+)", cell.source)[1]
        return names.index(name) if name in names else len(names)

    first = sources[0]
    helpers = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
    summary = "Source" if entries else f"Source of {helpers}" if names else "Source"
    first.source = folded(code, summary)
    first.outputs = [output for cell in sources for output in cell.get("outputs", [])]
    return [*sorted(entries, key=place), first]


def arranged(cells):
    "Return cells with each run of entries and exported source brought together."
    done, run = [], []
    for cell in cells:
        if is_entry(cell) or is_exported(cell):
            run.append(cell)
            continue
        done += [*_together(run), cell]
        run = []
    return done + _together(run)


# ---------------------------------------------------------------- Markdown


def plain_links(text):
    "Undo links within links: nbdev links a name in backticks that is already the text of a link."
    return re.sub(r"\[\[(`[^`\n]+`)\]\([^)\s]*\)\]\(([^)\s]*)\)", r"[\1](\2)", text)


def whole_cells(text):
    "Let smalldocs read formulas in table cells that end in a digit, which it takes for prices."
    return re.sub(r"(?m)(?<=\d)[ \t]*\|", "<!-- --> |", text) if "$" in text else text


def mended(markdown):
    "Mend what the renderer would show raw."
    lines = plain_links(markdown).split("\n")
    rows = [whole_cells(line) if line.startswith("|") else line for line in lines]
    return "\n".join(rows)


def apart(markdown, names):
    "Give a heading that is just a name an anchor of its own: the name's belongs to its entry."

    def heading(match):
        name = match[2].strip("`")
        return f"{match[0]} {{#about-{name}}}" if name in names else match[0]

    return re.sub(r"(?m)^(#+) (\S+)$", heading, markdown)


def shown(nb, captions):
    "Bring the cells of a processed notebook into the form in which the site shows them."
    nb.cells = arranged(nb.cells)
    names = {re.search(r"show_doc\((\w+)", c.source)[1] for c in nb.cells if is_entry(c)}
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = apart(mended(cell.source), names)
            captions.read(cell.source)
        elif cell.cell_type == "code":
            if not is_entry(cell) and (summary := summary_of(cell.source, cell.get("outputs"))):
                cell.source = folded(cell.source, summary)
            captions.tell(cell)
    return nb
