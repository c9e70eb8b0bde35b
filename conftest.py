"""How tests run: side by side, a file at a time and a notebook at a time (pytest-xdist).

`pytest -n 0` runs them one after the other. The order: cheap checks of the project, then what takes
longest, every notebook (nbmake, each in a kernel of its own), and the rest.
"""

import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))
# A file that takes minutes must not be the last one, with one core at work and the others idle.
# What it opens must be closed at its end (fixtures of its module): playwright's loop would be in
# the way of notebooks that the same worker runs after it.
ORDER = {"test_project.py": 0, "test_notebooks.py": 1, "test_site.py": 2, "test_engine.py": 2}
ORDER |= {".ipynb": 3, "test_pins.py": 5}
ALONE = ("test_numbers_are_as_they_were[", "test_shards_make_the_updates")  # beside their file

# Before torch is imported: workers share the cores. Some notebooks ask for two threads all the
# same; threads that wait must then sleep, for while they spin the others wait for a core (two such
# notebooks at once took 156 s each, and 38 s with this).
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


MANY = 5  # notebooks: fewer do not repay the start of a server of kernels
_open = contextlib.ExitStack()  # what ends with the session
_around = {}  # what notebooks find around them, once the first is run


def pytest_collection_modifyitems(config, items):
    "Sort the tests, and count the notebooks."
    items.sort(key=lambda item: ORDER.get(item.path.name, ORDER.get(item.path.suffix, 4)))
    config.has_many_notebooks = sum(item.path.suffix == ".ipynb" for item in items) > MANY


def pytest_unconfigure():
    "Close what was opened for the session."
    _open.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Let one worker run each file, each notebook and each long test as a whole."
    # xdist's own way, the mark xdist_group, has no effect with pytest 9.2
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, name = nodeid.partition("::")
            return nodeid if name.startswith(ALONE) else file

    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    "Give notebooks the environment that `tools/notebooks.py run` gives them."
    if item.path.suffix != ".ipynb":
        return (yield)
    import kernels
    import notebooks

    if not _around:
        _around.update(notebooks.environment())
        if item.config.has_many_notebooks and kernels.POSSIBLE:
            _around["JUPYTER_PATH"] = _open.enter_context(kernels.server(dict(_around)))
    with mock.patch.dict(os.environ, _around):
        return (yield)
