"Every notebook: its stored outputs come from the code as it is, and it runs from a fresh kernel; the check sees planted faults."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import notebooks as nbt  # noqa: E402

NOTEBOOKS = [pytest.param(p, id=p.stem) for p in nbt.notebooks()]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_stored_outputs(path):
    found = nbt.faults(path)
    assert not found, f"{path.name}: {'; '.join(found)}. Run: python tools/notebooks.py run {nbt.name(path)}"


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_runs(path):
    done = subprocess.run([sys.executable, ROOT / "tools/notebooks.py", "test", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]


# ---------------------------------------------------------------- the tool itself, on a project of two notebooks

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A project with notebook 00 (exports `a`), 01 (imports it, shows a log) and the tool, all run."
    root = tmp_path_factory.mktemp("small")
    for f in ("settings.ini", "tools/notebooks.py", "ddpo_scratch/__init__.py"):
        (root / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, root / f)
    (root / "experiments").mkdir()
    (root / "experiments/log.txt").write_text("3")
    (root / "ddpo_scratch/tiny_model").mkdir()
    (root / "ddpo_scratch/tiny_model/w.bin").write_bytes(b"0")
    (root / "nbs").mkdir()
    md, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    def write(name, *cells): nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), root / f"nbs/{name}.ipynb")
    write("00_a", md("# A\n\n> first"), code("#| default_exp a"), code("#| export\ndef two(): return 2"), code("two()"))
    write("01_b", md("# B\n\n> second"), code("from ddpo_scratch.a import two"), code("#| slow\n1/0"),
          code("print(two())"), code('open("../experiments/log.txt").read()'))
    assert tool(root, "run").returncode == 0 and tool(root, "export").returncode == 0
    return root


def tool(root, *args):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, root / "tools/notebooks.py", *args], cwd=root, env=env, capture_output=True, text=True)


@pytest.fixture
def project(small, tmp_path):
    return shutil.copytree(small, tmp_path / "p")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_run_leaves_nothing_to_fault(project):
    assert tool(project, "check").returncode == 0
    assert tool(project, "export", "--check").returncode == 0
    before = (project / "nbs/01_b.ipynb").read_bytes()
    assert tool(project, "run", "nbs/01_b.ipynb").returncode == 0
    assert (project / "nbs/01_b.ipynb").read_bytes() == before  # a second run makes no diff


@pytest.mark.parametrize("fault, said", [
    (("nbs/01_b.ipynb", "print(two())", "print(1+two())"), "01_b.ipynb: its code cells changed"),
    (("ddpo_scratch/a.py", "return 2", "return 3"), "01_b.ipynb: a module that it imports changed"),
    (("experiments/log.txt", "3", "4"), "01_b.ipynb: shipped weights, assets or experiment files"),
    (("ddpo_scratch/tiny_model/w.bin", "0", "1"), "00_a.ipynb: shipped weights, assets or experiment files"),
    (("nbs/01_b.ipynb", '"2\\n"', '"5\\n"'), "01_b.ipynb: its outputs are not those of its last whole run"),
    (("nbs/00_a.ipynb", '"execution_count": null', '"execution_count": 7'), "00_a.ipynb: not clean"),
])
def test_check_sees(project, fault, said):
    file, old, new = fault
    edit(project / file, old, new)
    done = tool(project, "check")
    assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr


def test_comments_in_a_module_make_nothing_stale(project):
    edit(project / "ddpo_scratch/a.py", "def two()", "# a remark\ndef two()")
    assert tool(project, "check").returncode == 0
    assert tool(project, "export", "--check").returncode == 1


def test_module_without_notebook_is_reported(project):
    (project / "ddpo_scratch/old.py").write_text("x = 1\n")
    done = tool(project, "export", "--check")
    assert done.returncode == 1 and "old.py: no notebook exports it" in done.stdout


def test_failing_cell_fails_the_test_and_names_the_notebook(project):
    edit(project / "nbs/01_b.ipynb", "print(two())", "assert two() == 5")
    done = tool(project, "test")
    assert done.returncode == 1 and "FAILED nbs/01_b.ipynb" in done.stderr
