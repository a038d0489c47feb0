"""What a running training shows: a live line for each network in a terminal, one plain line an epoch elsewhere."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

REFRESH_SECONDS = 0.2  # reading the loss waits for the accelerator, so it is not done at every step


def accuracy(row: dict[str, Any]) -> str:
    """What an epoch's metrics say of the test images."""
    return f"accuracy {row['test_top1']:.2f} %"


class Display:
    """Progress of one network after the other. Only the main process shows anything.

    `summary` makes an epoch's metrics into its score in words, "" where it has none.
    """

    def __init__(
        self,
        labels: Sequence[str],
        epochs: int,
        console: "Console",
        summary: Callable[[dict[str, Any]], str] = accuracy,
    ) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.console, self.epochs, self.summary = console, epochs, summary
        self.live = console.is_terminal and not console.quiet
        self.width = max(len(label) for label in labels)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not self.live,
            expand=True,
            refresh_per_second=4,
        )
        self.tasks: dict[str, TaskID] = {
            label: self.progress.add_task(label.ljust(self.width), total=1.0, status="waiting") for label in labels
        }
        self.label, self.test, self.refreshed = labels[0], "", 0.0
        self.started, self.done_before = time.perf_counter(), 0.0
        self.told: set[str] = set()

    def __enter__(self) -> "Display":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def start(self, label: str, epochs_done: int) -> None:
        """A network begins, or goes on after so many epochs."""
        self.label, self.test, self.refreshed = label, "", 0.0
        self.started, self.done_before = time.perf_counter(), epochs_done / self.epochs
        self.progress.update(self.tasks[label], completed=self.done_before, status="starting")

    @property
    def due(self) -> bool:
        """Whether a live line is to be brought up to date."""
        return self.live and time.perf_counter() - self.refreshed > REFRESH_SECONDS

    def step(self, epoch: int, share: float, images_per_second: float, loss: float) -> None:
        """Bring the live line up to date: `share` of the epoch's steps is done."""
        self.refreshed = time.perf_counter()
        done = (epoch + share) / self.epochs
        status = (
            f"epoch {epoch + 1}/{self.epochs}  {images_per_second:,.0f} images/s  loss {loss:.3f}{self.test}"
            f"  left {clock(self._left(done))}"
        )
        self.progress.update(self.tasks[self.label], completed=done, status=status)

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch ended with these metrics."""
        done = row["epoch"] / self.epochs
        score = self.summary(row)
        told = f"  {score}" if score else ""
        self.test = told or self.test
        line = (
            f"epoch {row['epoch']}/{self.epochs}  {row['train_images_per_second']:,.0f} images/s"
            f"  loss {row['train_loss']:.3f}{told}  left {clock(self._left(done))}"
            f"  data wait {row['train_data_wait_share']:.0%}"
        )
        if self.live:
            self.progress.update(self.tasks[self.label], completed=done, status=line)
        else:
            self.console.print(f"{self.label.ljust(self.width)}  {line}", highlight=False, soft_wrap=True)

    def broken(self, sentences: set[str]) -> list[str]:
        """Images that could not be read in an epoch; those that were not shown before in this run."""
        fresh = sorted(sentences - self.told)
        self.told |= sentences
        for sentence in fresh:
            self.console.print(f"left out: {sentence}", highlight=False, soft_wrap=True)
        return fresh

    def finished(self, label: str, note: str) -> None:
        """A network is done."""
        self.progress.update(self.tasks[label], completed=1.0, status=note)
        if not self.live:
            self.console.print(f"{label.ljust(self.width)}  {note}", highlight=False, soft_wrap=True)

    def _left(self, done: float) -> float:
        """Seconds to the end of this network at the pace so far."""
        fresh = done - self.done_before
        return (time.perf_counter() - self.started) * (1 - done) / fresh if fresh > 0 else 0.0


def clock(seconds: float) -> str:
    """1:05 or 2:03:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
