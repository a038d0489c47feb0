"""What the project says of itself in several places is the same in all of them."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import dense_shortcuts as ds
from dense_shortcuts.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What another distribution brings: a module of ours is reached only where that one is installed.
BROUGHT = {
    **{"triton": "torch", "filelock": "torch", "cv2": "grad-cam", "starlette": "gradio", "braceexpand": "webdataset"},
    **dict.fromkeys(("torchvision", "numpy", "PIL", "yaml", "huggingface_hub"), "timm"),
}


def test_the_version_stands_in_the_package_and_in_the_citation():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dense_shortcuts.__version__"}
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == ds.__version__


def test_every_package_that_is_imported_is_declared():
    project = PROJECT["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    declared = {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}
    distributions = packages_distributions()
    for name in sorted(imported()):
        known = {BROUGHT.get(name, name), *distributions.get(name, [])}
        assert {normalised(each) for each in known} & declared, f"{name} is imported and not declared"


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_installs_what_the_package_says_and_what_training_needs(extra):
    installed = packages_of(extra)
    assert {normalised(package) for package in EXTRAS[extra].values()} <= installed
    assert {normalised(package) for package in EXTRAS["train"].values()} <= installed


def test_every_public_name_has_its_place_in_the_pages_of_the_api():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = {line.rpartition(".")[2] for line in pages.splitlines() if line.startswith("::: ")}
    assert set(ds.__all__) <= shown


def packages_of(extra: str) -> set[str]:
    """The packages of an extra, with those of the extras that it names."""
    found = set()
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        name, others = re.match(r"([\w.-]+)(?:\[(.+?)\])?", requirement).groups()
        own = name == "dense-shortcuts"
        found |= set().union(*map(packages_of, others.split(","))) if own else {normalised(name)}
    return found


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported() -> set[str]:
    """The names of other packages that the package imports anywhere."""
    found = set()
    for path in (ROOT / "dense_shortcuts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"dense_shortcuts", "_typeshed"}
