"""Tests run side by side, a file at a time and a notebook at a time (pytest-xdist; `pytest -n 0` runs them one after the other).

The order: cheap checks of the project, then every notebook, then the rest, the site last.
"""
import os

import pytest

ORDER = {"test_project.py": 0, "test_notebooks.py": 1, "test_site.py": 3}

# Before torch is imported: workers share the cores. Some notebooks ask for two threads all the same; threads that
# wait must then sleep, for while they spin the others wait for a core (two such notebooks at once: 156 s each; so: 38 s).
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ORDER.get(item.path.name, 2))
    for item in items: item.add_marker(pytest.mark.xdist_group(item.name if item.name.startswith("test_runs[") else item.path.name))
