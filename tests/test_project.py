"""The project as a whole: modules in sync with notebooks, few arrows, pages that can be read.

The rules of the page are functions of tests/page.py; each is shown here to see a planted fault.
"""

import ast
import importlib
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import page
import pytest
from page import ROOT

import notebooks as nbt
import stale

LIB = ROOT / "ddpo_scratch"
MODULES = stale.module_names(LIB)
SOURCES = {m: stale.module_file(m, LIB).read_text(encoding="utf-8") for m in MODULES}
SCRIPTS = sorted(
    [p for d in ("experiments", "benchmarks", "tools", "tests") for p in (ROOT / d).glob("*.py")]
)
HEAVY = (
    "diffusers transformers peft accelerate matplotlib timm wandb open_clip torchvision scipy PIL"
    " inflect datasets bert_score requests safetensors"
).split()
DEV = (
    "nbdev fastcore execnb nbclient nbconvert nbformat nbmake IPython ipykernel pytest smalldocs"
    " playwright deepspeed"
).split()
each_module = pytest.mark.parametrize("module", MODULES)


def python(code):
    "Run code in a fresh Python and return what it prints."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---------------------------------------------------------------- in step with the notebooks


def test_modules_are_what_the_notebooks_export(capsys):
    wrong = nbt.export(check=True)
    assert not wrong, "run: python tools/notebooks.py export\n" + capsys.readouterr().out


def test_readme_is_what_index_makes(capsys):
    wrong = nbt.readme(check=True)
    assert not wrong, "run: python tools/notebooks.py readme\n" + capsys.readouterr().out


@pytest.mark.parametrize(
    "text, mended",
    [
        ("[a](book/01_a.ipynb#x)", "[a](nbs/book/01_a.ipynb#x)"),
        ("![](../experiments/a.png)", "![](experiments/a.png)"),
        ('<img width="9" src="images/a.png">', '<img width="9" src="nbs/images/a.png">'),
        ("[a](https://a.org) [b](#b)", "[a](https://a.org) [b](#b)"),
        ("```\n[a](b.ipynb)\n```", "```\n[a](b.ipynb)\n```"),
    ],
)
def test_links_of_the_readme_start_from_the_root(text, mended):
    assert nbt.from_root(text) == mended


@pytest.mark.parametrize(
    "command",
    [
        ".venv/bin/pip install -e . && .venv/bin/ddpo_train",
        ".venv/bin/pip install -e '.[dev]' && .venv/bin/pytest",
    ],
)
def test_readme_gives_the_two_commands(command):
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    # .ci/run runs the second as it stands there
    assert "python -m venv .venv && " + command in lines


def test_version_is_that_of_the_settings():
    assert f'__version__ = "{nbt.CFG["version"]}"' in (LIB / "__init__.py").read_text()


def test_sidebar_lists_every_notebook_once_and_in_order():
    listed = re.findall(r"[\w/-]+\.ipynb", (ROOT / "nbs/sidebar.yml").read_text())
    files = [path.relative_to(nbt.NBS).as_posix() for path in nbt.notebooks()]
    assert listed == files, set(listed) ^ set(files)


def test_links_between_notebooks_lead_somewhere():
    wrong = []
    for path in nbt.notebooks():
        text = "\n".join(c.source for c in nbt.read(path).cells if c.cell_type == "markdown")
        text = re.sub(r"```.*?```|`[^`\n]*`|\$[^$]*\$", "", text, flags=re.S)
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", text)
        wrong += [f"{path.name} -> {x}" for x in links if not (path.parent / x).exists()]
    assert not wrong, wrong


def test_a_title_stands_alone():
    "Of the cell with the title, nbdev shows the title and the line in quotes, and drops the rest."
    alone = re.compile(r"# [^\n]+(\n+> [^\n]+)?\s*")
    paths = nbt.notebooks()
    assert not [p.name for p in paths if not alone.fullmatch(nbt.read(p).cells[0].source)]


def test_the_book_can_be_finished():
    "Sixteen chapters, fewer than 400 cells; modules are exported elsewhere."
    chapters = {
        path.name: nbt.read(path).cells for path in nbt.notebooks() if path.parent.name == "book"
    }
    assert len(chapters) == 16 and sum(map(len, chapters.values())) < 400
    text = {name: "".join(cell.source for cell in cells) for name, cells in chapters.items()}
    assert not [name for name, source in text.items() if "#| export" in source]


# ---------------------------------------------------------------- imports


def test_rooms_have_few_arrows_and_no_circle():
    faults = page.graph_faults(page.rooms(LIB))
    assert not faults, "\n".join(faults)


def package(folder, **sources):
    "Write a package of modules, `a__b` for a/b.py, and return its folder."
    for name, source in sources.items():
        path = folder / "ddpo_scratch" / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source)
    return folder / "ddpo_scratch"


def test_rooms_know_each_other_by_strings_and_folders_are_counted_whole(tmp_path):
    lib = package(
        tmp_path,
        named="",
        rewards__base='import pkgutil\nfrom ..named import Registry\nHERE = "ddpo_scratch.rewards"',
        config='REWARDS = "ddpo_scratch.rewards"',
        trl__config="from ..config import TrainConfig",
        trl__trainer="from .config import DDPOConfig",
    )
    graph = page.rooms(lib)
    assert graph["config"] == {"rewards.base"} and graph["trl.trainer"] == {"trl.config"}
    assert page.houses(graph) == {
        "config": {"rewards"},
        "named": set(),
        "rewards": {"named"},
        "trl": {"config"},
    }


@pytest.mark.parametrize(
    "sources, fault",
    [
        (dict(a="from . import b", b='HIGHER = "ddpo_scratch.a:f"'), "a circle among a, b"),
        (dict(a="def f():\n    from .b__c import x", b__c="import ddpo_scratch.a"), "a circle"),
        (dict(train="from . import a, b, c", a="", b="", c=""), "train knows 3 rooms: a, b, c"),
        (dict(d="from . import a, b, c", a="", b="", c=""), "3 arrows, more than 2:\na -> \nb"),
    ],
)
def test_faults_of_the_graph_are_seen(tmp_path, sources, fault):
    sources = {k: s.replace("b__c", "b.c") for k, s in sources.items()}
    faults = page.graph_faults(page.rooms(package(tmp_path, **sources)), 2, 2)
    assert any(message.startswith(fault) for message in faults), faults


@each_module
def test_no_star_imports(module):
    nodes = ast.walk(ast.parse(SOURCES[module]))
    assert not any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in nodes)


def test_modules_import_without_dev_or_heavy_packages():
    "Import every module in one process that bars development packages; list what came along."
    printed = python(f"""
import importlib, sys

class Bar:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {DEV!r}:
            raise ModuleNotFoundError(name + " is a development dependency", name=name)

sys.meta_path.insert(0, Bar())
for module in {MODULES!r}:
    importlib.import_module("ddpo_scratch." + module)
print(*sorted({{name.split(".")[0] for name in sys.modules}} & set({HEAVY!r})))
""")
    assert not printed, f"imported at import time: {printed}"


def test_importing_the_package_does_not_import_torch():
    assert python("import sys, ddpo_scratch; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_scripts_import_names_that_exist(script):
    "A script that runs for hours is seldom run: it must not break unseen when a name moves."
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == LIB.name:
            exec(ast.unparse(node), {})  # or an ImportError that says which


# ---------------------------------------------------------------- the page


@each_module
def test_no_line_of_the_package_is_too_long(module):
    assert not (faults := page.long_lines(page.hand_written(SOURCES[module]))), faults


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_line_of_a_script_is_too_long(script):
    assert not (faults := page.long_lines(script.read_text(encoding="utf-8"))), faults


@pytest.mark.parametrize("path", nbt.notebooks(), ids=lambda p: p.stem)
def test_no_line_of_a_notebooks_code_is_too_long(path):
    cells = enumerate(nbt.read(path).cells)
    lines = {k: page.long_lines(c.source) for k, c in cells if c.cell_type == "code"}
    faults = {k: found for k, found in lines.items() if found}
    assert not faults, faults


def test_long_lines_are_seen_but_not_what_nbdev_lays_out():
    made = f'"""{"a" * 120}"""\n__all__ = [{", ".join(["1"] * 60)}]\n'
    source = made + f"x = 1  # {'a' * 91}\ny = 1  # {'a' * 92}\n"
    assert page.long_lines(page.hand_written(source)) == ["line 4 has 101 columns"]
    assert len(page.long_lines(source)) == 3


def test_ruff_formats_nothing_anew():
    done = page.ruff("format", "--check", ".")
    assert done.returncode == 0, done.stdout


def test_ruff_finds_no_fault():
    done = page.ruff("check", "--output-format", "concise", ".")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "source, rule",
    [
        ("x = 1; y = 2\n", "E702"),
        ("if 1: x = 1\n", "E701"),
        ("f = lambda x: x\n", "E731"),
        (f"x = 1  # {'a' * 93}\n", "E501"),
        ("import os\n", "F401"),
    ],
)
def test_ruff_sees(source, rule):
    done = page.ruff("check", "-", "--stdin-filename", "tests/planted.py", stdin=source)
    assert done.returncode == 1 and rule in done.stdout
    assert page.ruff("format", "--check", "-", stdin="x = (1,2)\n").returncode == 1


def test_the_package_grows_little_when_it_is_formatted():
    factor = page.growth([page.hand_written(source) for source in SOURCES.values()])
    assert factor <= 1.2, f"ruff format makes the package longer by a factor of {factor:.2f}"


def test_growth_is_seen():
    assert page.growth(["if a: b()\nelse: c()\n"]) == 2
    assert page.growth(["x = 1\n\n\ny = 2\n"]) == 1


def test_functions_fit_a_screen_and_are_not_shredded():
    lengths = {}
    for module, source in SOURCES.items():
        functions = page.function_lengths(source)
        lengths |= {f"{module}: {name}": count for name, count in functions.items()}
    assert not (faults := page.length_faults(lengths)), "\n".join(faults)


def test_lengths_are_seen_after_formatting():
    long = "def f(x):\n    if x: return 1\n" + "    x += 1\n" * 42
    lengths = page.function_lengths(long)
    assert lengths == {"f, line 1": 45} and not page.length_faults(lengths)
    assert page.length_faults(page.function_lengths(long + "    x += 1\n")) == [
        "f, line 1: 46 lines"
    ]
    shreds = page.function_lengths("def f():\n    return 1\n")
    assert page.length_faults(shreds) == ["the median function has 2 lines"]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] not in ("models", "trl")])
def test_no_unet_outside_the_models(module):
    assert not (faults := page.words(SOURCES[module], "unet")), faults


def test_words_are_seen():
    source = "x = pipe.unet\ny = 'UNet'  # unet/\nz = UNet2DConditionModel\nu = 1\n"
    assert len(page.words(source, "unet")) == 3


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("methods.")])
def test_no_room_compares_methods_by_name(module):
    from ddpo_scratch.methods.base import method_names

    assert not (faults := page.comparisons(SOURCES[module], method_names())), faults


@pytest.mark.parametrize(
    "source",
    [
        'if config.method == "ddpo_is":\n    pass',
        'x = config.method in ("rwr", "ddpo_is")',
        'x = "ddpo_is" != config.method',
        'match config.method:\n    case "ddpo_is":\n        pass',
        'x = [m for m in methods if m == "ddpo_is"]',
    ],
)
def test_comparisons_are_seen(source):
    assert page.comparisons(source, ["ddpo_is"]) == ["line 1 compares with ddpo_is"]
    assert not page.comparisons(source, ["ddpo_sf"])
    assert not page.comparisons('x = dict(method="ddpo_is")', ["ddpo_is"])


# ---------------------------------------------------------------- documentation


@each_module
def test_every_return_is_documented(module):
    loaded = importlib.import_module(f"ddpo_scratch.{module}")
    functions = page.public_functions(loaded) | page.public_methods(loaded)
    assert not (faults := page.return_faults(functions)), "\n".join(faults)


@each_module
def test_every_annotation_names_something(module):
    loaded = importlib.import_module(f"ddpo_scratch.{module}")
    functions = page.public_functions(loaded) | page.public_methods(loaded)
    assert not (faults := page.annotation_faults(functions)), "\n".join(faults)


@each_module
def test_every_parameter_is_documented(module):
    functions = page.public_functions(importlib.import_module(f"ddpo_scratch.{module}"))
    assert not (faults := page.parameter_faults(functions)), "\n".join(faults)


@each_module
def test_every_public_function_class_and_method_has_a_docstring(module):
    loaded = importlib.import_module(f"ddpo_scratch.{module}")
    functions = page.public_functions(loaded) | page.public_methods(loaded)
    silent = [name for name, function in functions.items() if not function.__doc__]
    assert not silent, silent


PLANTED = """
__all__ = ["good", "bare", "lost", "context", "shared", "Room"]

def good(
    x,  # (b,)
    *args,  # more
    n=1,  # how often
    **fields,  # the rest
) -> list:  # (b,) as floats
    "Do."
    return [x]

def bare(x) -> None:
    "Do."
    def inside():
        return 1
    return None

def lost(
    x,  # (b,)
): # -> (b,) lost
    return x

def context(
    path,  # where
) -> str:
    "Do."
    yield path

def shared(
    a, b,  # two numbers
) -> "Sum":  # their sum
    "Do."
    return a + b

class Room:
    "A room."
    def __len__(self): return 1
    def told(self) -> int:  # doors
        "Count."
        return 1
    @property
    def doors(self): return 1
"""


def test_documentation_sees_planted_faults(tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text(textwrap.dedent(PLANTED))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("planted_module")
    functions, methods = page.public_functions(module), page.public_methods(module)
    assert methods.keys() == {"Room.told", "Room.doors"}
    faults = [message.partition(":")[0] for message in page.return_faults(functions | methods)]
    assert faults == ["lost", "context", "Room.doors"]
    assert page.annotation_faults(functions) == ["shared: name 'Sum' is not defined"]
    assert page.parameter_faults(functions) == [
        "bare: no comment beside x",
        "shared: several parameters on a line",
        "shared: no comment beside a",
    ]


@each_module
def test_a_module_has_few_public_names(module):
    names = page.public_names(SOURCES[module])
    # prompts is a catalogue: each of its sources has a name
    most = 20 if module == "prompts" else 13
    assert len(names) <= most, f"{len(names)} public names"
    if len(names) > 8:
        warnings.warn(f"{module} has {len(names)} public names; about 8 are wanted", stacklevel=1)


def test_public_names_are_counted():
    assert page.public_names("import os\n__all__ = ['a', 'b']\n") == ["a", "b"]
    assert page.public_names("import os\n") == []


# ---------------------------------------------------------------- the repository


def git(*args, cwd=ROOT):
    done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout


def tracked():
    try:
        files = git("ls-files", "-z").split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    return [ROOT / file for file in files if file and (ROOT / file).is_file()]


def test_repository_is_small(tmp_path):
    # in a clone over git's transport: a working repository also holds what no branch reaches, and
    # some objects in several packs
    files = tracked()
    size = sum(p.stat().st_size for p in files)
    assert size < 60e6, f"tracked files weigh {size / 1e6:.0f} MB"
    git("clone", "--quiet", "--bare", "--no-local", str(ROOT), str(tmp_path))
    counts = re.findall(r"(\S+): (\d+)$", git("count-objects", "-v", cwd=tmp_path), re.M)
    kib = {name: int(count) for name, count in counts}
    assert (kib["size"] + kib["size-pack"]) / 1024 < 60, f"git objects: {kib}"
    sizes = {p.name: p.stat().st_size for p in files if p.suffix == ".ipynb"}
    big = {name: size for name, size in sizes.items() if size > nbt.MAX_BYTES}
    assert not big, f"notebooks over {nbt.MAX_BYTES} bytes: {big}"


MACHINES = re.compile(
    r"(?<![\w.~-])/(?:root|home/[a-z]\w*|Users/\w+|work/(?:main|env|shared)|opt/(?:pypi|wheels))\b"
    r"|--(?:extra-)?index-url|hf_[A-Za-z0-9]{30,}"
    r"|(?:pypi|npm|debian)[\w.-]*\.(?:internal|local|corp)\b"
)


def machines(path):
    "List the absolute paths of a machine, package mirrors and token-like words in a file."
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    if path.suffix == ".ipynb":
        text = re.sub(r'"image/\w+": "[^"]*"', "", text)
    return [f"{path.name}: {m[0]}" for m in MACHINES.finditer(text)]


def test_tracked_text_names_no_machine():
    files = [path for path in tracked() if path != Path(__file__).resolve()]
    assert not (faults := [fault for path in files for fault in machines(path)]), faults


@pytest.mark.parametrize("text", ["/home/ann/x", "see /root", "--index-url x", "hf_" + "a" * 30])
def test_machines_are_seen(tmp_path, text):
    (tmp_path / "a.txt").write_text(f"a\n{text}\n")
    assert len(machines(tmp_path / "a.txt")) == 1
