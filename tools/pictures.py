"""Say in words what a notebook's pictures show, for those who do not see them, and caption them.

A cell's own `#| fig-alt:` and `#| fig-cap:` come first. Else the sentence before the cell says what
is shown, and the cell's code how: its titles, axes and labels.
"""

import ast
import html
import re

IMAGES = ("image/png", "image/jpeg", "image/gif", "image/svg+xml")
# how matplotlib's calls and keywords name what is written into a picture
TITLES = {"title", "set_title", "suptitle", "titles", "row_labels"}
AXES = {"xlabel": "x", "ylabel": "y", "set_xlabel": "x", "set_ylabel": "y"}
PLOTS = {"plot", "scatter", "errorbar", "fill_between", "semilogy", "loglog", "step", "axhline"}
LONGEST = 300  # characters of an alternative text


def option(source, name):
    "Return the value of a cell's `#| name: value`, or nothing."
    found = re.search(rf"^#\|\s*{name}:\s*(.+)$", source, re.M)
    return found[1].strip().strip("\"'") if found else ""


def plain(markdown):
    "Return Markdown's words without its marks."
    text = re.sub(r"```.*?```|^\|.*$|\$\$.*?\$\$", " ", markdown, flags=re.S | re.M)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\$([^$]+)\$", lambda m: tex(m[1]), text)
    text = re.sub(r"\*\*|\*(?=\S)|(?<=\S)\*|`|<[^>]+>", "", text)
    return text


GREEK = {
    name: chr(code)
    for name, code in zip(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho"
        " varsigma sigma tau upsilon phi chi psi omega".split(),
        range(0x3B1, 0x3CA),
        strict=True,
    )
} | dict(Sigma="Σ", Delta="Δ", Pi="Π", Omega="Ω", Theta="Θ", nabla="∇", infty="∞", sum="Σ")
SIGNS = dict(
    le="≤", leq="≤", ge="≥", geq="≥", neq="≠", approx="≈", sim="~", times="×", cdot="·", pm="±",
    to="→", rightarrow="→", mid="|", varepsilon="ε", propto="∝", ldots="…", dots="…",
    equiv="≡", partial="∂", int="∫", sqrt="√", log="log", exp="exp", min="min", max="max",
) | {"in": "∈"}  # fmt: skip


def tex(formula):
    "Write a formula as plain text: Greek letters and signs as themselves, no commands."
    text = re.sub(r"\\(begin|end)\{\w*\}|&", " ", formula)  # several lines
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\([A-Za-z]+)", lambda m: GREEK.get(m[1], SIGNS.get(m[1], " ")), text)
    return " ".join(re.sub(r"\\.|[{}$]|\\", "", text).split())


def sentences(markdown):
    "Return the sentences of the first paragraph of prose in Markdown text."
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", plain(markdown)))
    prose = next((b for b in blocks if b and not b.startswith(("#", "|", ">", "- "))), "")
    return re.split(r"(?<=[.?!:])\s+(?=[A-Z`\"'(\d])", prose)


def heading(markdown):
    "Return the last heading in Markdown text, or nothing."
    found = re.findall(r"^#+\s+(.+)$", plain(markdown), re.M)
    return found[-1].strip() if found else ""


def _joined(node):
    "Write an f-string with an ellipsis for each thing that is filled in."
    return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)


def _texts(node):
    "List the texts in an expression."
    if isinstance(node, ast.JoinedStr):
        texts = [_joined(node)]
    elif isinstance(node, ast.Constant):
        texts = [node.value] if isinstance(node.value, str) else []
    else:
        texts = [text for child in ast.iter_child_nodes(node) for text in _texts(child)]
    return [text for text in texts if re.search(r"[^\W_]", text)]


def _named(call):
    "Yield what a call's name and keywords say with which expressions."
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if call.args:
        yield name, call.args[0]
    for keyword in call.keywords:
        yield keyword.arg, keyword.value


def drawn(source):
    "Say what a cell's code draws: its axes, titles and labels."
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    axes, titles, labels = {}, [], []
    for name, value in (pair for call in calls for pair in _named(call)):
        if name in AXES and (words := _texts(value)):
            axes.setdefault(AXES[name], words[0])
        elif name in TITLES:
            titles += _texts(value)
        elif name == "label":
            labels += _texts(value)
    called = {getattr(call.func, "attr", "") for call in calls}
    parts = []
    if axes:
        parts.append("; ".join(f"{axis}: {plain(words)}" for axis, words in sorted(axes.items())))
    if titles:
        parts.append("titles: " + ", ".join(dict.fromkeys(plain(t).strip() for t in titles)))
    if labels:
        parts.append("curves: " + ", ".join(dict.fromkeys(plain(t).strip() for t in labels)))
    kind = "A plot" if axes or called & PLOTS else "Pictures"
    return f"{kind} ({'; '.join(parts)})" if parts else kind


def shortened(text):
    "Cut a text at a word."
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " …"


def alternative(source, before, section):
    "Return the alternative text of a cell's pictures: its own, or what prose and code say."
    if own := option(source, "fig-alt"):
        return own
    said = sentences(before)[0].rstrip(":") if before else ""
    # a short remark such as "The same:" says less than its section's heading
    said = said if len(said) > 24 else f"{section}: {said}" if said else section
    said = said.rstrip(". ")
    end = "" if said.endswith("?") else "."
    return shortened(f"{said}{end} {drawn(source)}.")


def figure(image, alt, caption):
    "Write a picture with its alternative text and caption."
    image = re.sub(r"^<(img|svg)\b", lambda m: f'<{m[1]} alt="{html.escape(alt)}"', image, count=1)
    if image.startswith("<svg"):
        image = image.replace("alt=", 'role="img" aria-label=', 1)
    return f'<figure class="figure">{image}<figcaption>{caption}</figcaption></figure>'


def element(kind, data):
    "Write a stored picture as an element of HTML."
    data = data if isinstance(data, str) else "".join(data)
    if kind == "image/svg+xml":
        return data[data.index("<svg") :]
    return f'<img class="img-fluid" src="data:{kind};base64,{"".join(data.split())}">'


def _kind(output):
    "Return the kind of picture that an output holds, if it is one."
    data = output.get("data", {})
    return next((k for k in IMAGES if k in data), None) if "text/html" not in data else None


class Captions:
    "Give a page's pictures their texts, cell by cell; they are numbered."

    def __init__(self, title=""):
        self.count, self.section, self.before = 0, title, ""

    def read(self, markdown):
        "Remember the prose that stands before the next cells."
        self.section = heading(markdown) or self.section
        if sentences(markdown)[0]:
            self.before = markdown

    def caption(self, source, part):
        "Return the next picture's caption: the cell's own, or its section's heading."
        self.count += 1
        words = option(source, "fig-cap") or self.section + part
        return f"<b>Figure {self.count}.</b> {html.escape(words)}"

    def tell(self, cell):
        "Put the texts of a code cell's pictures beside them."
        outputs = [output for output in cell.get("outputs", []) if _kind(output)]
        alt = alternative(cell.source, self.before, self.section)
        for k, output in enumerate(outputs, 1):
            kind = _kind(output)
            part = f", {k} of {len(outputs)}" if len(outputs) > 1 else ""
            words = f"{alt.rstrip('.')}{part}." if part else alt
            caption = self.caption(cell.source, part)
            text = figure(element(kind, output["data"][kind]), words, caption)
            output["data"] = {"text/html": text}
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/html")
            if text and "<img" in (text := "".join(text)) and "<figure" not in text:
                silent = r"<img(?![^>]*\balt=\"[^\"])"
                output["data"]["text/html"] = re.sub(silent, f'<img alt="{html.escape(alt)}"', text)
