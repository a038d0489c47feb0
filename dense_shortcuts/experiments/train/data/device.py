"""Images that stay on the device as uint8: crop, flip and normalisation there, with the worker loader's own numbers."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ....errors import DenseShortcutError
from .broken import BrokenImages, readable
from .images import Images, free_bytes
from .transformed import mixed_seed


class DeviceImages(Dataset):
    """The same images, to the bit, as `TransformedImages` with a crop from the padded image and a flip.

    An index is (epoch, place), and a list of them gives a whole batch: images (B, 3, S, S) as float32 and labels (B,).

    Args:
        images: the source; it is read once, here.
        resize: brings each image to S x S.
        mean, std: of the channels.
        broken: gets the images that cannot be read. They are told of with every epoch, as if they were read in each.
        padding: pixels around an image from which it is cropped, None for a test's images.
        flip: whether to mirror half of the images.
    """

    def __init__(
        self,
        images: Images,
        resize: Callable[[Image.Image], Image.Image],
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        broken: BrokenImages,
        device: torch.device,
        *,
        padding: int | None = None,
        flip: bool = False,
    ) -> None:
        self.images, self.seed, self.broken, self.padding, self.flip = images, seed, broken, padding, flip
        broken.keep = True
        pixels, labels = decoded(images, resize, broken, training=padding is not None)
        self.size = pixels.shape[1]
        border = (padding or 0, padding or 0)
        self.pixels = torch.from_numpy(np.pad(pixels, ((0, 0), border, border, (0, 0)))).to(device)
        self.labels = torch.from_numpy(labels).to(device)
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        places = torch.tensor([index[1] for index in indices], device=self.pixels.device)
        batch = self.pixels[places] if self.padding is None else self.augmented(places, indices)
        images = batch.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(self.mean).div_(self.std)
        return images, self.labels[places]

    def augmented(self, places: Tensor, indices: Sequence[tuple[int, ...]]) -> Tensor:
        """Crops of the images at `places`, half of them mirrored where asked for, (B, S, S, 3)."""
        tops, lefts, mirrored = (
            torch.from_numpy(values).to(places.device)
            for values in crops(self.seed, indices, self.padding or 0, flip=self.flip)
        )
        along = torch.arange(self.size, device=places.device)
        rows = tops[:, None] + along
        columns = lefts[:, None] + torch.where(mirrored[:, None], along.flip(0), along)
        return self.pixels[places[:, None, None], rows[:, :, None], columns[:, None, :]]


def crops(
    seed: int, indices: Sequence[tuple[int, ...]], padding: int, *, flip: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What torchvision's RandomCrop and RandomHorizontalFlip draw when seeded for each index: top, left, mirrored.

    An image's numbers depend on its own index alone, so no batch size, number of processes or resumption changes them.
    """
    numbers = iter(first_numbers(np.array([mixed_seed(seed, *index) for index in indices], np.uint32), 3))
    nothing = np.zeros(len(indices), np.int64)
    choices = 2 * padding + 1
    top = next(numbers).astype(np.int64) % choices if padding else nothing
    left = next(numbers).astype(np.int64) % choices if padding else nothing
    # PyTorch's float32 between 0 and 1 is made of 24 bits.
    mirrored = (next(numbers) & 0xFFFFFF) < 1 << 23 if flip else nothing.astype(bool)
    return top, left, mirrored


def first_numbers(seeds: np.ndarray, count: int) -> list[np.ndarray]:
    """The first 32-bit numbers that MT19937, PyTorch's generator on the CPU, gives after each seed: `count` of (B,).

    All seeds go through the generator's recurrence together, for seeding a generator for each image would take longer
    than its crop.
    """
    state = [seeds.astype(np.uint32)]
    for place in range(1, 397 + count):
        last = state[-1]
        state.append(np.uint32(1812433253) * (last ^ (last >> np.uint32(30))) + np.uint32(place))
    numbers = []
    for place in range(count):
        joined = (state[place] & np.uint32(0x80000000)) | (state[place + 1] & np.uint32(0x7FFFFFFF))
        number = state[place + 397] ^ (joined >> np.uint32(1)) ^ ((joined & np.uint32(1)) * np.uint32(0x9908B0DF))
        number ^= number >> np.uint32(11)
        number ^= (number << np.uint32(7)) & np.uint32(0x9D2C5680)
        number ^= (number << np.uint32(15)) & np.uint32(0xEFC60000)
        numbers.append(number ^ (number >> np.uint32(18)))
    return numbers


def decoded(
    images: Images, resize: Callable[[Image.Image], Image.Image], broken: BrokenImages, *, training: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, S, S, 3) as uint8 and labels (N,) of all images.

    Raises:
        DenseShortcutError: too many broken images, or some that are not square.
    """

    def read(place: int) -> tuple[np.ndarray, int]:
        image, label = readable(images, place, broken, training=training)
        return np.asarray(resize(image)), label

    with ThreadPoolExecutor() as pool:  # PIL decodes and resizes without holding Python's lock
        found = list(pool.map(read, range(len(images))))
    sizes = {pixels.shape[:2] for pixels, _ in found}
    if len(sizes) > 1 or any(height != width for height, width in sizes):
        raise DenseShortcutError("--loader device needs square images: take --loader workers.")
    return np.stack([pixels for pixels, _ in found]), np.asarray([label for _, label in found], np.int64)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
