"""How tests run: side by side, a file at a time and a notebook at a time (pytest-xdist).

`pytest -n 0` runs them one after the other. The order: cheap checks of the project, then every
notebook (nbmake, each in a kernel of its own), then the rest, the site last.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))
ORDER = {"test_project.py": 0, "test_notebooks.py": 1, ".ipynb": 2, "test_site.py": 4}

# Before torch is imported: workers share the cores. Some notebooks ask for two threads all the
# same; threads that wait must then sleep, for while they spin the others wait for a core (two such
# notebooks at once took 156 s each, and 38 s with this).
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items):
    "Sort the tests, and let one worker run each file, each notebook and each long test as a whole."
    long = ("test_numbers_are_as_they_were[", "test_shards_make_the_updates")
    items.sort(key=lambda item: ORDER.get(item.path.name, ORDER.get(item.path.suffix, 3)))
    for item in items:
        alone = item.name.startswith(long)
        group = item.name if alone else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    "Give notebooks the environment that `tools/notebooks.py run` gives them."
    if item.path.suffix != ".ipynb":
        return (yield)
    import notebooks

    with mock.patch.dict(os.environ, notebooks.environment()):
        return (yield)
