"""Every notebook's stored outputs come from the code as it is; the check sees planted faults.

That every notebook runs is tested by nbmake: `pytest nbs` collects them, conftest.py at the root
orders them.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import kernels  # noqa: E402
import notebooks as nbt  # noqa: E402
import stale  # noqa: E402

NOTEBOOKS = [pytest.param(p, id=p.stem) for p in nbt.notebooks()]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_stored_outputs(path):
    messages = nbt.faults(path)
    command = f"python tools/notebooks.py run {nbt.name(path)}"
    assert not messages, f"{path.name}: {'; '.join(messages)}. Run: {command}"


# ---------------------------------------------------------------- what a source imports


SMALL = {
    "__init__": '__version__ = "0.1.0"\n',
    "lab": '"A docstring may name ddpo_scratch.plots."\nfrom .methods import base\n',
    "named": "",
    "plots": "",
    "methods/__init__": "",
    "methods/base": "import pkgutil\nfrom .. import named\n",
    "methods/ppo": "from .base import Method\nfrom ..plots import line\n",
    "trl/__init__": "from .config import Config\n",
    "trl/config": 'REWARD = "ddpo_scratch.methods.ppo:PPO"\n',
}


@pytest.fixture
def lib(tmp_path):
    "A package whose folder `methods` is discovered at run time."
    for name, source in SMALL.items():
        path = tmp_path / "ddpo_scratch" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "ddpo_scratch"


def test_packages_count_where_they_hold_code(lib):
    modules = ["lab", "methods.base", "methods.ppo", "named", "plots", "trl", "trl.config"]
    assert stale.module_names(lib) == modules


@pytest.mark.parametrize(
    "module, arrows",
    [
        ("lab", {"methods.base"}),
        ("methods.base", {"named"}),
        ("methods.ppo", {"methods.base", "plots"}),
        ("trl", {"trl.config"}),
        ("trl.config", {"methods.ppo"}),
    ],
)
def test_relative_imports_and_names_in_strings_are_arrows(lib, module, arrows):
    source = stale.module_file(module, lib).read_text()
    assert stale.imported(source, lib, module) == arrows


@pytest.mark.parametrize(
    "cell, module",
    [
        ("from ddpo_scratch import lab", "lab"),
        ("def f():\n    import ddpo_scratch.methods.ppo as p", "methods.ppo"),
        ("!python -m ddpo_scratch.plots --out x", "plots"),
        ("%%bash\npython -c 'import ddpo_scratch.named'", "named"),
        ("files = !ddpo_train --help", "lab"),
    ],
)
def test_cells_name_modules_in_shell_lines_and_magics_too(lib, cell, module):
    assert stale.cell_imports(cell, lib, {"ddpo_train": "lab"}) == {module}


def test_a_folder_that_is_discovered_is_reached_as_a_whole(lib):
    assert stale.reached({"lab"}, lib).keys() == {
        *("lab", "named", "plots", "methods", "methods.base", "methods.ppo")
    }


# ---------------------------------------------------------------- the tool itself


def notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A project of two notebooks, both run: 01_a exports `a`, 02_b imports it and shows a log."
    root = tmp_path_factory.mktemp("small")
    tools = ("tools/notebooks.py", "tools/stale.py", "tools/kernels.py")
    for file in ("settings.ini", "conftest.py", "pytest.ini", *tools, "ddpo_scratch/__init__.py"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    (root / "experiments").mkdir()
    (root / "experiments/log.txt").write_text("3")
    (root / "ddpo_scratch/presets").mkdir()
    (root / "ddpo_scratch/presets/x.yaml").write_text("a: 0")
    md, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    notebook(
        root / "nbs/book/01_a.ipynb",
        md("# A\n\n> first"),
        code("#| default_exp rooms.a"),
        code("#| export\ndef two():\n    return 2"),
        code("two()"),
    )
    notebook(
        root / "nbs/library/02_b.ipynb",
        md("# B\n\n> second"),
        code("from ddpo_scratch.rooms.a import two"),
        code("#| slow\n1/0"),
        code("print(two())"),
        code('open("../../experiments/log.txt").read()'),
    )
    for command in ("run", "export"):
        done = tool(root, command)
        assert done.returncode == 0, done.stderr
    return root


def run(root, *command):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


def tool(root, *args):
    return run(root, "tools/notebooks.py", *args)


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
    notebook = project / "nbs/library/02_b.ipynb"
    before = notebook.read_bytes()
    assert tool(project, "run", "nbs/library/02_b.ipynb").returncode == 0
    assert notebook.read_bytes() == before  # a second run changes nothing
    assert not tool(project, "run", "--stale").stdout


A, B = "nbs/book/01_a.ipynb", "nbs/library/02_b.ipynb"
DATA = "shipped weights, presets, assets or experiment files"


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        (B, "print(two())", "print(1+two())", "02_b.ipynb: its code cells changed"),
        ("ddpo_scratch/rooms/a.py", "return 2", "return 3", "02_b.ipynb: a module that it imports"),
        ("experiments/log.txt", "3", "4", f"02_b.ipynb: {DATA}"),
        ("ddpo_scratch/presets/x.yaml", "0", "1", f"01_a.ipynb: {DATA}"),
        (B, '"2\\n"', '"5\\n"', "02_b.ipynb: its outputs are not those of its last whole run"),
        (A, '"execution_count": null', '"execution_count": 7', "01_a.ipynb: not clean"),
    ],
)
def test_check_sees(project, file, old, new, message):
    edit(project / file, old, new)
    done = tool(project, "check")
    assert done.returncode == 1 and message in done.stdout, done.stdout + done.stderr


def test_a_figure_that_was_not_drawn_is_seen(project):
    "Jupyter draws a Figure only once pyplot is in use; before, readers would see its repr."
    notebook = project / "nbs/book/03_c.ipynb"
    code = "from matplotlib.figure import Figure\nfig = Figure()\nfig.subplots()\nfig"
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(made, notebook)
    assert tool(project, "run", str(notebook)).returncode == 0
    done = tool(project, "check", str(notebook))
    assert done.returncode == 1 and "as text: needs %matplotlib inline" in done.stdout
    made.cells[0].source = f"%matplotlib inline\n{code}"
    nbformat.write(made, notebook)
    assert tool(project, "run", str(notebook)).returncode == 0
    assert tool(project, "check", str(notebook)).returncode == 0


def test_comments_in_a_module_make_nothing_stale(project):
    edit(project / "ddpo_scratch/rooms/a.py", "def two()", "# a remark\ndef two()")
    assert tool(project, "check").returncode == 0
    assert tool(project, "export", "--check").returncode == 1


def test_module_without_notebook_is_reported(project):
    (project / "ddpo_scratch/rooms/old.py").write_text("x = 1\n")
    done = tool(project, "export", "--check")
    assert done.returncode == 1 and "rooms/old.py: no notebook exports it" in done.stdout


def test_a_failed_export_harms_nothing(project):
    edit(project / A, "#| default_exp rooms.a", "#| default_exp")
    before = (project / "ddpo_scratch/rooms/a.py").read_bytes()
    assert tool(project, "export").returncode != 0
    assert (project / "ddpo_scratch/rooms/a.py").read_bytes() == before


def test_failing_cell_fails_the_test_and_names_the_notebook(project):
    pytest_alone = ("-m", "pytest", "-n", "0", "-q", "nbs")
    done = run(project, *pytest_alone)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout  # without the slow cell
    edit(project / B, "print(two())", "assert two() == 5")
    done = run(project, *pytest_alone)
    assert done.returncode == 1 and "FAILED nbs/library/02_b.ipynb" in done.stdout, done.stdout


# ---------------------------------------------------------------- kernels that are forks


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    "A kernel of a server that has imported little, and its client."
    from jupyter_client.manager import start_new_kernel

    environment = dict(os.environ, SAYS="served")
    with kernels.server(environment, ["ipykernel.kernelapp", "this"]) as path:
        monkeypatch.setenv("JUPYTER_PATH", path)
        monkeypatch.setenv("SAYS", "asked")
        manager, client = start_new_kernel(cwd=tmp_path)
        yield manager, client
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def result(client, code):
    "Run a cell; return the text of its result, or the name of its error."
    found = []
    client.execute_interactive(code, timeout=60, output_hook=lambda m: found.append(m["content"]))
    texts = [c["data"]["text/plain"] if "data" in c else c.get("ename") for c in found]
    return next((text for text in texts if text), None)


def ends(pid, seconds=20):
    "Say whether a process ends, though nobody may have asked yet how."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not kernels.POSSIBLE, reason="forks of loaded libraries are for Linux")
def test_a_forked_kernel_is_as_a_new_one(kernel, tmp_path):
    manager, client = kernel
    assert result(client, "import os, sys, subprocess; os.getcwd()") == repr(str(tmp_path))
    assert result(client, "os.environ['SAYS'], '' in sys.path") == "('asked', True)"
    assert result(client, f"{str(ROOT / 'tools')!r} in sys.path") == "False"
    assert result(client, "'this' in sys.modules, 'torch' in sys.modules") == "(True, False)"
    assert result(client, "subprocess.run(['true']).returncode") == "0"
    assert result(client, "__name__, 'kernels' in sys.modules") == "('__main__', False)"
    forked = "p = multiprocessing.get_context('fork').Process(target=print)"
    result(client, f"import multiprocessing; {forked}; p.start(); p.join(20)")
    assert result(client, "p.exitcode") == "0", "a DataLoader's workers are such forks"
    pid = int(result(client, "os.getpid()"))
    threading.Timer(1, manager.interrupt_kernel).start()
    assert result(client, "import time; time.sleep(60)") == "KeyboardInterrupt"
    assert int(result(client, "os.getpid()")) == pid
    manager.shutdown_kernel()
    assert ends(pid)


@pytest.mark.skipif(not kernels.POSSIBLE, reason="forks of loaded libraries are for Linux")
@pytest.mark.parametrize("who", ["manager", "server", "kernel"])
def test_no_forked_kernel_is_left(kernel, who):
    manager, client = kernel
    pid = int(result(client, "import os; os.getpid()"))
    if who == "manager":
        manager.shutdown_kernel(now=True)
    else:
        os.kill(int(result(client, "os.getppid()")) if who == "server" else pid, signal.SIGKILL)
    assert ends(pid)
    if who == "kernel":
        assert ends(manager.provisioner.pid)


WRITES_ITS_WORKER = """
import os
import pytest

@pytest.mark.parametrize("i", range(4))
def test_numbers_are_as_they_were(i, tmp_path_factory):
    line = f"{os.environ['PYTEST_XDIST_WORKER']}\\n"
    with open(__file__ + ".log", "a") as file:
        file.write(line)

@pytest.mark.parametrize("i", range(8))
def test_of_a_file(i):
    line = f"file {os.environ['PYTEST_XDIST_WORKER']}\\n"
    with open(__file__ + ".log", "a") as file:
        file.write(line)
"""


def test_a_file_stays_on_one_worker_but_for_its_long_tests(tmp_path):
    "What tests of a file share, such as the site, is then made once."
    for file in ("conftest.py", "pytest.ini"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text(WRITES_ITS_WORKER)
    (tmp_path / "tests/test_b.py").write_text(WRITES_ITS_WORKER)
    done = run(tmp_path, "-m", "pytest", "-n", "2", "-q", "tests")
    assert done.returncode == 0, done.stdout
    long_ones = set()
    for name in "ab":
        lines = (tmp_path / f"tests/test_{name}.py.log").read_text().splitlines()
        assert len(lines) == 12 and len({line for line in lines if line[:4] == "file"}) == 1
        long_ones |= {line for line in lines if line[:4] != "file"}
    assert len(long_ones) > 1, "the long ones are shared out"
