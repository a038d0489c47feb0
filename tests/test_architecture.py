"""The rooms of the package: arrows go down the list in pyproject.toml and nothing goes round in a circle."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_go_down_the_rooms_and_in_no_circle():
    """In a process of its own, since import-linter sets up logging for the whole process."""
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "2 kept, 0 broken" in done.stdout, done.stdout + done.stderr


def test_few_modules_lie_directly_in_the_package():
    assert len(list((ROOT / "dense_shortcuts").glob("*.py"))) <= 10
