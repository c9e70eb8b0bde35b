"The order of the tests: cheap checks of the project, then every notebook, then the rest, the site last."
ORDER = {"test_project.py": 0, "test_notebooks.py": 1, "test_site.py": 3}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ORDER.get(item.path.name, 2))
