"Package metadata, all of it from settings.ini."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser()
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
licenses = {"apache2": "Apache-2.0"}
statuses = {"2": "Pre-Alpha", "3": "Alpha", "4": "Beta", "5": "Production/Stable"}
readme = root / "README.md"
lib = cfg["lib_name"]


def with_addresses(text):
    "Let README's pictures and links lead to the repository, for pages that show it elsewhere."
    if not cfg["git_url"]:
        return text
    home, branch = cfg["git_url"].rstrip("/"), cfg["branch"]
    near = r"\((?!https?:|#|mailto:)"
    text = re.sub(rf"(!\[[^\]]*\]){near}", rf"\1({home}/raw/{branch}/", text)
    return re.sub(rf"(?<!!)(\[[^\]]*\]){near}", rf"\1({home}/blob/{branch}/", text)


extras = {name: cfg[f"{name}_requirements"].split() for name in cfg["extras"].split()}
extras["all"] = sorted({requirement for name in extras for requirement in extras[name]})
extras["dev"] = cfg["dev_requirements"].split() + extras["all"]  # the tests try every extra

setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=with_addresses(
        readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"]
    ),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"] or None,
    license=licenses[cfg["license"]],
    keywords=cfg["keywords"],
    classifiers=[
        f"Development Status :: {cfg['status']} - {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
    ],
    packages=find_packages(include=[lib, f"{lib}.*"]),
    package_data={lib: ["tiny_model/**", "assets/**", "presets/**"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
    zip_safe=False,
)
