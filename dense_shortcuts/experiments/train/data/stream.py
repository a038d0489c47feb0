"""Images that come one after the other, too many to keep at hand: shuffled by a buffer, shared among processes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ....errors import DenseShortcutError
from .broken import BrokenImages
from .images import BrokenImage, decode, label_error
from .transformed import mixed_seed, seeded

Sample = tuple[Any, int, str]


@dataclass(frozen=True)
class Place:
    """Which part of a stream a reader gets, and which pass over it this is.

    Attributes:
        process, processes: of the run.
        worker, workers: of the process.
        seed: of the order, another one in each pass.
    """

    process: int
    processes: int
    worker: int
    workers: int
    seed: int


class Source(Protocol):
    """Encoded images in passing."""

    def readers(self, processes: int) -> int:
        """How many workers of each of so many processes can have a part of their own."""
        ...

    def samples(self, place: Place, broken: BrokenImages) -> Iterator[Sample]:
        """(bytes of the image file, label, name for errors), each of the reader's images once."""
        ...


@dataclass(frozen=True)
class Stream:
    """Training images of a stream; `length` of them are an epoch."""

    source: Source
    length: int
    classes: int
    transform: Callable[..., Tensor]
    seed: int
    broken: BrokenImages

    def __len__(self) -> int:
        return self.length


class StreamShare(IterableDataset):
    """What one process trains on in an epoch: `batches` whole batches of (image, label).

    The order follows from the seed and the numbers of processes and workers. A reader that comes to the end of its
    shards before the others begins them anew. Set `epoch` before each pass; worker processes see it too.
    """

    def __init__(self, stream: Stream, process: int, processes: int, batches: int, batch_size: int) -> None:
        self.stream, self.process, self.processes = stream, process, processes
        self.batches, self.batch_size = batches, batch_size
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        own = len(range(worker, self.batches, workers)) * self.batch_size
        return itertools.islice(self.images(worker, workers), own)

    def images(self, worker: int, workers: int) -> Iterator[tuple[Tensor, int]]:
        """Images without end.

        Raises:
            DenseShortcutError: too many are broken, a label is outside the classes, or there is no image at all.
        """
        stream, epoch, number = self.stream, self.epoch, 0
        for turn in itertools.count():
            before = number
            place = Place(self.process, self.processes, worker, workers, mixed_seed(stream.seed, epoch, turn))
            for content, label, where in stream.source.samples(place, stream.broken):
                try:
                    image = decode(content, where)
                except BrokenImage as error:
                    stream.broken.add(error)
                    continue
                if not isinstance(label, int) or not 0 <= label < stream.classes:
                    raise label_error(label, stream.classes, where)
                with seeded(stream.seed, epoch, self.process, worker, number):
                    yield stream.transform(image), label
                number += 1
            if number == before:
                raise DenseShortcutError("a part of the training files has no image that can be read: check them.")
