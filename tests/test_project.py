"The project as a whole: modules in sync with notebooks, few arrows between them, quick imports, a small clean repository."
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "ddpo_scratch"
sys.path.insert(0, str(ROOT / "tools"))
import notebooks as nbt  # noqa: E402

# Which modules a module may import: the arrows of the house. `train` and `cli` know most rooms, nothing knows them.
METHODS = {"policy_gradient", "ppo", "advantage", "rwr", "backprop", "rollout"}
ARROWS = {
    "diffusion": set(),
    "sd": {"diffusion"},
    "prompts": set(),
    "rewards": set(),
    "reward_models": {"rewards"},
    "rollout": {"diffusion"},
    "policy_gradient": set(),
    "ppo": set(),
    "advantage": set(),
    "rwr": {"diffusion"},
    "backprop": {"diffusion", "rollout"},
    "lab": {"diffusion", "rollout"},
    "evaluate": {"rollout", "diffusion"},
    "config": {"backprop", "sd"},
    "report": {"config", "evaluate"},
    "train": METHODS | {"config", "diffusion", "sd", "prompts", "report", "rewards", "evaluate"},
    "cli": {"train", "config", "sd", "prompts", "rewards", "reward_models", "evaluate"},
    "trl": {"advantage", "backprop", "diffusion", "ppo", "reward_models", "rollout", "sd"},
    "tiny": {"prompts"},
    "tiny_clip": {"prompts", "reward_models", "tiny"},
}
MODULES = sorted(p.stem for p in LIB.glob("*.py") if not p.stem.startswith("_"))
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "matplotlib", "timm", "wandb", "open_clip"}  # only inside functions
DEV = {"nbdev", "fastcore", "execnb", "nbclient", "nbformat", "IPython", "ipykernel", "pytest", "smalldocs"}


def imports(module):
    "The project's modules that `module` imports, anywhere in it."
    return nbt.imported((LIB / f"{module}.py").read_text(encoding="utf-8"), "ddpo_scratch")


def tracked():
    try: out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError): pytest.skip("not a git repository")
    return [ROOT / f for f in out.split("\0") if f and (ROOT / f).is_file()]


def test_modules_are_what_the_notebooks_export(capsys):
    wrong = nbt.export(check=True)
    assert not wrong, "run: python tools/notebooks.py export\n" + capsys.readouterr().out


def test_readme_is_what_index_makes(capsys):
    wrong = nbt.readme(check=True)
    assert not wrong, "run: python tools/notebooks.py readme\n" + capsys.readouterr().out


@pytest.mark.parametrize("command", [".venv/bin/pip install -e . && .venv/bin/ddpo_train", ".venv/bin/pip install -e '.[dev]' && .venv/bin/pytest"])
def test_readme_gives_the_two_commands(command):
    lines = [l.strip() for l in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    assert "python -m venv .venv && " + command in lines  # .ci/run runs the second as it stands there


@pytest.mark.parametrize("module", MODULES)
def test_arrows(module):
    assert module in ARROWS, f"{module} has no row in the table of allowed imports"
    assert (found := imports(module)) <= ARROWS[module], f"{module} imports {sorted(found - ARROWS[module])}: not an arrow of the design"


def test_import_graph_has_no_circle():
    graph, done = {m: imports(m) for m in MODULES}, []
    while graph:
        free = [m for m, deps in graph.items() if not deps & set(graph)]
        assert free, f"a circle among {sorted(graph)}"
        done += free
        for m in free: del graph[m]
    assert sorted(done) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_no_star_imports(module):
    tree = ast.parse((LIB / f"{module}.py").read_text(encoding="utf-8"))
    assert not any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(tree))


def test_modules_import_without_dev_or_heavy_packages():
    "One fresh process imports every module while development packages are barred, and lists what came along."
    code = f"""
import sys, importlib
class Bar:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {DEV!r}: raise ModuleNotFoundError(name + ' is a development dependency', name=name)
sys.meta_path.insert(0, Bar())
for m in {MODULES!r}: importlib.import_module('ddpo_scratch.' + m)
print(*sorted({{m.split('.')[0] for m in sys.modules}} & {HEAVY!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"imported at import time: {done.stdout}"


SCRIPTS = sorted(p for d in ("experiments", "benchmarks", "tools", "tests") for p in (ROOT/d).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_scripts_import_names_that_exist(script):
    "A script that runs for hours is seldom run: it must not break unseen when a name moves to another module."
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ddpo_scratch": exec(ast.unparse(node), {})  # or an ImportError that says which


def test_package_imports_quickly():
    code = "import time; t = time.perf_counter(); import ddpo_scratch; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2


def test_version_is_that_of_the_settings():
    assert f'__version__ = "{nbt.CFG["version"]}"' in (LIB / "__init__.py").read_text()


def test_sidebar_lists_every_notebook():
    listed = re.findall(r"[\w-]+\.ipynb", (ROOT / "nbs/sidebar.yml").read_text())
    assert not (missing := {p.name for p in nbt.notebooks()} - set(listed)), f"add to nbs/sidebar.yml: {sorted(missing)}"
    assert len(listed) == len(set(listed))


def test_links_between_notebooks_lead_somewhere():
    wrong = []
    for path in nbt.notebooks():
        text = "\n".join(c.source for c in nbt.read(path).cells if c.cell_type == "markdown")
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", re.sub(r"```.*?```|`[^`\n]*`|\$[^$]*\$", "", text, flags=re.S)):
            if not (path.parent / link).exists(): wrong.append(f"{path.name} -> {link}")
    assert not wrong, wrong


def test_repository_is_small(tmp_path):
    "Counted in a clone over git's transport: a working repository also holds what no branch reaches, and some objects in several packs."
    files = tracked()
    size = sum(p.stat().st_size for p in files)
    assert size < 60e6, f"tracked files weigh {size / 1e6:.0f} MB"
    subprocess.run(["git", "clone", "--quiet", "--bare", "--no-local", ROOT, tmp_path], check=True)
    out = subprocess.run(["git", "count-objects", "-v"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    kib = {k: int(v) for k, v in re.findall(r"(\S+): (\d+)$", out, re.M)}
    assert (kib["size"] + kib["size-pack"]) / 1024 < 60, f"git objects: {kib}"
    big = {p.name: p.stat().st_size for p in files if p.suffix == ".ipynb" and p.stat().st_size > nbt.MAX_BYTES}
    assert not big, f"notebooks over {nbt.MAX_BYTES} bytes: {big}"


def test_tracked_text_names_no_machine():
    "No absolute path of anybody's machine, no package mirror, no token-like word in what is committed."
    bad = re.compile(r"(?<![\w.~-])/(?:root|home/[a-z]\w*|Users/\w+|work/(?:main|env|shared)|opt/(?:pypi|wheels))\b|--(?:extra-)?index-url|hf_[A-Za-z0-9]{30,}"
                     r"|(?:pypi|npm|debian)[\w.-]*\.(?:internal|local|corp)\b")
    found = []
    for p in tracked():
        if "vendor" in p.parts or p == Path(__file__).resolve(): continue
        try: text = p.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        if p.suffix == ".ipynb": text = re.sub(r'"image/\w+": "[^"]*"', "", text)
        found += [f"{p.relative_to(ROOT)}: {m[0]}" for m in bad.finditer(text)]
    assert not found, found
