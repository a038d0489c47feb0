"""The rooms of the package: arrows go down the list in pyproject.toml and nothing goes round in a circle."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[1]


def test_imports_go_down_the_rooms_and_in_no_circle(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


def test_few_modules_lie_directly_in_the_package():
    assert len(list((ROOT / "dense_shortcuts").glob("*.py"))) <= 10
