"""run.log: what happened to a run, in the order in which it happened, for whoever finds the folder later."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

RUN_LOG = "run.log"

_logger = logging.getLogger("dense_shortcuts")


class RunLog(logging.FileHandler):
    """Adds lines to a file; a line that cannot be written, say on a full disk, does not end the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextlib.contextmanager
def run_log(folder: Path, process: int) -> Iterator[None]:
    """Messages of the package go into the folder's run.log: all of the first process, warnings of the others."""
    handler = RunLog(folder / RUN_LOG, encoding="utf-8")
    handler.setLevel(logging.INFO if process == 0 else logging.WARNING)
    form = f"%(asctime)s [{process}] %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%Y-%m-%d %H:%M:%S"))
    before = _logger.level
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        _logger.setLevel(before)
        _logger.removeHandler(handler)
        handler.close()
