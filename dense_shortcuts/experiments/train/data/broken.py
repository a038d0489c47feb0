"""Images that cannot be read: told of once by name, replaced, counted, and refused where they are too many."""

import multiprocessing
from typing import Any

from PIL import Image

from ....errors import DenseShortcutError
from .images import BrokenImage, Images

REPORT_BYTES = 1 << 20  # of the sentences about an epoch's broken images: several thousand of them


class BrokenImages:
    """The broken images that worker processes met in an epoch, in memory that they share.

    One broken image never ends a run, unless `share` is 0; more than `share` of them do.

    Args:
        share: of all images, that may be broken.
        images: number of all images.
        what: names the images in the error, such as "training images".

    Attributes:
        keep: the images are read once for all epochs, so that `take` gives the same with each.
    """

    def __init__(self, share: float, images: int, what: str) -> None:
        self.share, self.images, self.what = share, images, what
        self.allowed = max(1, int(share * images)) if share else 0
        self.keep = False
        self.lines: Any = multiprocessing.Array("c", REPORT_BYTES)

    def add(self, error: BrokenImage) -> None:
        """Keep an image's sentence, once.

        Raises:
            DenseShortcutError: too many of them, or the first where none may be broken.
        """
        line = str(error)
        if not self.allowed:
            raise DenseShortcutError(line) from error
        with self.lines.get_lock():
            before = self.lines.value
            lines = before.decode().splitlines()
            if line not in lines:
                lines.append(line)
                text = "\n".join(lines).encode()
                self.lines.value = text if len(text) < REPORT_BYTES else before
        if len(lines) > self.allowed:
            raise DenseShortcutError(
                f"{len(lines)} of {self.images:,} {self.what} cannot be read, more than --max-broken {self.share:g} "
                f"allows; one of them: {line}"
            ) from error

    def take(self) -> list[str]:
        """The sentences since the last call."""
        with self.lines.get_lock():
            lines = self.lines.value.decode().splitlines()
            self.lines.value = self.lines.value if self.keep else b""
        return sorted(lines)


def readable(images: Images, place: int, broken: BrokenImages, *, training: bool) -> tuple[Image.Image, int]:
    """The image at a place, or what stands in for it where it is broken.

    Raises:
        DenseShortcutError: too many are broken.
    """
    try:
        return images[place]
    except BrokenImage as error:
        broken.add(error)
    if not training:
        return Image.new("RGB", (64, 64)), int(images.labels[place])
    for step in range(1, len(images)):
        try:
            return images[(place + step) % len(images)]
        except BrokenImage:  # it is told of when its own turn comes
            continue
    raise DenseShortcutError("no image can be read: give --data-dir a folder with images.")
