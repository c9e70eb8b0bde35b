#!/usr/bin/env python
"""List where the book first uses and where it defines its words and symbols.

python tools/first_uses.py            # of the words and symbols below
python tools/first_uses.py entropy    # of other words

A word is defined where it stands in bold or italics, or opens a row of a table. A symbol is defined
where the word that explains it stands in the same cell.
"""

import re
import sys
from pathlib import Path

import nbformat

BOOK = Path(__file__).resolve().parents[1] / "nbs/book"
WORDS = (
    "latent",
    "reward",
    "state",
    "action",
    "policy",
    "trajectory",
    "rollout",
    "return",
    "baseline",
    "advantage",
    "on-policy",
    "off-policy",
    "ratio",
    "clip",
    "LoRA",
    "policy gradient",
    "over-optimisation",
    "exploration",
    "score",
    "unbiased",
    "pathwise",
    "surrogate",
    "evolution strategy",
    "classifier-free guidance",
    "guidance scale",
    "epoch",
    "objective",
    "effective sample size",
    "standard error",
    "KL penalty",
    "log-prob",
    "denoiser",
    "step rule",
    "density",
    "transition",
    "REINFORCE",
    "reward hacking",
    "divergence",
)
# symbol as LaTeX has it, and a word that must stand in the cell of its first use
SYMBOLS = {
    r"\theta": "weights",
    r"\mu": "mean",
    r"\sigma": "deviation",
    r"\mathcal N": "drawn at random",
    r"\nabla": "gradient",
    r"\varepsilon": "clip",
    r"\eta": "exploration",
    r"\bar\alpha": "DDPM",
    r"\omega": "guidance",
    r"\tau": "trajectories",
    r"\delta": "probability",
}


def book(folder=BOOK):
    "List the book's prose in the order of reading: (notebook, cell, text)."
    found = []
    for path in sorted(folder.glob("*.ipynb")):
        for k, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "markdown":
                found.append((path.stem, k, cell.source))
    return found


def prose(text):
    "Take away what is no prose: code, mathematics, the targets of links."
    return re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)", " ", text, flags=re.S)


def forms(word):
    "Return a pattern for a word and its plural."
    stem = re.escape(word[:-1] if word.endswith("y") else word)
    return stem + ("(?:y|ies)" if word.endswith("y") else "s?")


def first_use(word, cells):
    "Find the first cell whose prose has the word: (notebook, cell), or None."
    pattern = re.compile(rf"(?<![\w-]){forms(word)}(?![\w-])", re.I)
    return next(((name, k) for name, k, text in cells if pattern.search(prose(text))), None)


def first_definition(word, cells):
    "Find the first cell that sets the word in bold or italics, or opens a row of a table with it."
    pattern = re.compile(
        rf"(?<!\*)\*{{1,2}}{forms(word)}\*{{1,2}}(?!\*)|^\| {forms(word)} \|", re.I | re.M
    )
    return next(((name, k) for name, k, text in cells if pattern.search(text)), None)


def first_symbol(symbol, cells):
    "Find the first cell whose mathematics has the symbol: (notebook, cell, text), or None."
    pattern = re.compile(re.escape(symbol) + "(?![A-Za-z])")
    for cell in cells:
        if pattern.search(" ".join(re.findall(r"\$[^$]*\$", cell[2].replace("$$", "$")))):
            return cell
    return None


def faults(cells, words=WORDS, symbols=SYMBOLS):
    "List words that are used before they are defined, and symbols that nothing explains."
    order = {(name, k): place for place, (name, k, _) in enumerate(cells)}
    found = []
    for word in words:
        used, defined = first_use(word, cells), first_definition(word, cells)
        if defined is None:
            found.append(f"{word} is not defined")
        elif order[used] < order[defined]:
            found.append(f"{word} is used in {used} and defined in {defined}")
    for symbol, word in symbols.items():
        cell = first_symbol(symbol, cells)
        if cell is None:
            found.append(f"{symbol} is not used")
        elif word not in cell[2]:
            found.append(f"{symbol} is used in {cell[:2]} without the word {word!r}")
    return found


def main(words):
    cells = book()
    for word in words or WORDS:
        print(f"{word:26} used {first_use(word, cells)}, defined {first_definition(word, cells)}")
    for symbol in () if words else SYMBOLS:
        cell = first_symbol(symbol, cells)
        print(f"{symbol:26} used {cell and cell[:2]}")
    print(*faults(cells, words or WORDS, {} if words else SYMBOLS), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
