"""A command of `dsnet` in words that can be typed where the program runs."""

import os
import shlex
import shutil
import sys
import sysconfig


def dsnet(*words: object) -> str:
    """The command with these words, quoted for a shell."""
    return shlex.join([*_program(), *map(str, words)])


def _program() -> list[str]:
    """`dsnet` by its name where the shell finds the one of this environment, else by its path."""
    script = shutil.which("dsnet", path=sysconfig.get_path("scripts"))
    if script is None:  # run from the sources
        return [sys.executable, "-m", "dense_shortcuts.cli"]
    found = shutil.which("dsnet")
    if found is not None and os.path.samefile(found, script):
        return ["dsnet"]
    below = os.path.relpath(script)
    return [script if below.startswith(os.pardir) else os.path.join(os.curdir, below)]
