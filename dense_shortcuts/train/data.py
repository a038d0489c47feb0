"""Images: handwritten digits, CIFAR-100 and folders, as data sets whose order and augmentation follow from a seed."""

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ..errors import DenseShortcutError
from .config import TrainConfig

if TYPE_CHECKING:
    import pyarrow as pa

# Whatever PIL raises for a file that is not an image, cut short, or made to overflow.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class Images(Protocol):
    """Pictures with labels; an item is (RGB image, label)."""

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Data:
    """A data set ready for training.

    Attributes:
        train, test: items are (image (3, S, S) as float32, label).
        classes: names of the classes, the label being the place in it.
        mean, std, interpolation: what images are normalised and resized with.
    """

    train: "TransformedImages"
    test: "TransformedImages"
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


@dataclass(frozen=True)
class Arrays:
    """Images held in memory as (N, H, W, 3) uint8, with labels (N,)."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.labels[index])


@dataclass(frozen=True)
class Files:
    """Image files with labels, read when asked for."""

    samples: Sequence[tuple[str, int]]

    @property
    def labels(self) -> np.ndarray:
        return np.asarray([label for _, label in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        try:
            return Image.open(path).convert("RGB"), label
        except IMAGE_ERRORS as error:
            raise DenseShortcutError(f"{path} is not a whole image ({error}): replace or remove it.") from error


class TransformedImages(Dataset):
    """Images after their transform. An index is (epoch, place): augmentation follows from it and the seed alone.

    So the same images come with any number of worker processes, and a resumed run needs no saved random state.
    """

    def __init__(self, images: Images, transform: Callable[[Image.Image], torch.Tensor], seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, place = index
        image, label = self.images[place]
        with seeded(self.seed, epoch, place):
            return self.transform(image), label


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, place) pairs: shuffled by (seed, epoch) alone, or in order. Set `epoch` before each pass."""

    def __init__(self, length: int, *, shuffle: bool, seed: int) -> None:
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        places = np.random.default_rng([self.seed, self.epoch]).permutation(self.length) if self.shuffle else None
        return ((self.epoch, int(i)) for i in (places if places is not None else range(self.length)))


def mixed_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers, without the likeness that their sum would have."""
    return zlib.crc32(repr(numbers).encode())


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and PyTorch's CPU generator follow from `numbers` inside.

    PyTorch's go on as before afterwards, for drop path draws from them between two images. NumPy's and Python's do not:
    keeping their states takes longer than a small image's whole transform, and mixup seeds itself.
    """
    seed = mixed_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerator's generator too
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def load_data(config: TrainConfig) -> Data:
    """The data set that a resolved configuration asks for.

    Raises:
        DenseShortcutError: missing or empty folder, unreadable file or image, missing column, label out of range.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from ..models.dsnet import CIFAR_MEAN, CIFAR_STD

    train: Images
    test: Images
    if config.data == "digits":
        train, test, classes = load_digits(config)
        mean, std = (0.305,) * 3, (0.376,) * 3  # of the 8x8 training images
    elif config.data == "cifar100":
        train, test, classes = load_cifar100(config)
        mean, std = CIFAR_MEAN, CIFAR_STD
    else:
        train, test, classes = load_folder(config)
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    interpolation = "bicubic" if config.data == "imagefolder" else "bilinear"
    look = {"mean": mean, "std": std, "interpolation": interpolation}
    return Data(
        TransformedImages(train, train_transform(config, look), config.seed),
        TransformedImages(test, eval_transform(config, look), config.seed),
        classes,
        mean,
        std,
        interpolation,
    )


def train_transform(config: TrainConfig, look: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """timm's training transform; with `crop_padding` a crop from the padded image stands in for the resized crop.

    Raises:
        DenseShortcutError: an augmentation policy that timm does not know.
    """
    from timm.data import create_transform
    from torchvision import transforms

    assert config.img_size is not None
    # Colour jitter is left out by None; by 0 it would be run and change nothing.
    settings = look | {"hflip": 0.5 if config.flip else 0.0, "auto_augment": config.auto_augment, "color_jitter": None}
    try:
        transform = create_transform(config.img_size, is_training=True, **settings)
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise DenseShortcutError(
            f"--auto-augment {config.auto_augment!r} does not work ({error}): take one such as rand-m9-mstd0.5."
        ) from error
    if config.crop_padding is not None:  # as DeiT does for CIFAR
        resize = transforms.Resize(config.img_size, transforms.InterpolationMode(look["interpolation"]))
        crop = transforms.RandomCrop(config.img_size, config.crop_padding)
        transform.transforms[:1] = [resize, crop]
    return transform


def eval_transform(config: TrainConfig, look: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """timm's test transform; folders of photographs are resized a little larger and cropped in the middle."""
    from timm.data import create_transform

    assert config.img_size is not None
    return create_transform(config.img_size, crop_pct=0.875 if config.data == "imagefolder" else 1.0, **look)


def load_digits(config: TrainConfig) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """scikit-learn's 1,797 digits, 8x8 pixels of 17 grey levels; a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    grey = (images.reshape(-1, 8, 8, 1) * (255 / 16)).round().astype(np.uint8)
    pixels = grey.repeat(3, axis=3)
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    train, test = Arrays(parts[0], parts[2]), Arrays(parts[1], parts[3])
    return head(train, config.limit_train), head(test, config.limit_test), tuple(str(d) for d in range(10))


def head(arrays: Arrays, limit: int | None) -> Arrays:
    """The first `limit` images of an already shuffled set."""
    return arrays if limit is None else Arrays(arrays.pixels[:limit], arrays.labels[:limit])


def load_cifar100(config: TrainConfig) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """CIFAR-100 from a folder of parquet files, else from torchvision, which downloads it there and checks it."""
    if config.data_dir is None:
        raise DenseShortcutError(
            "CIFAR-100 needs a folder: give --data-dir DIR, with the parquet files or for the download."
        )
    folder = existing_folder(config.data_dir)
    files = {part: sorted(folder.glob(f"{part}-*.parquet")) for part in ("train", "test")}
    if not any(files.values()):
        return download_cifar100(folder, config)
    for part, found in files.items():
        if not found:
            raise DenseShortcutError(f"{folder} has no {part}-*.parquet: put the {part} images beside the others.")
    train = read_parquet(files["train"], config.limit_train)
    test = read_parquet(files["test"], config.limit_test)
    return train, test, class_names(folder / "classes.txt")


def class_names(path: Path) -> tuple[str, ...]:
    """The 100 names in a file, one a line, else the numbers."""
    names = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return tuple(names) if len(names) == 100 else tuple(str(i) for i in range(100))


def download_cifar100(folder: Path, config: TrainConfig) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """torchvision's CIFAR-100 in `folder`; it unpickles nothing whose checksum is not that of the original files."""
    from torchvision.datasets import CIFAR100

    try:
        train, test = CIFAR100(str(folder), train=True, download=True), CIFAR100(str(folder), train=False)
    except (OSError, RuntimeError) as error:  # no network, no space, or a file with another checksum
        raise DenseShortcutError(
            f"{folder} has no train-*.parquet and test-*.parquet and the download of CIFAR-100 failed ({error}): "
            "give --data-dir a folder with these files, or connect to a network."
        ) from error
    # The order is the files' own, which is already mixed.
    parts = [Arrays(part.data, np.asarray(part.targets)) for part in (train, test)]
    return head(parts[0], config.limit_train), head(parts[1], config.limit_test), tuple(train.classes)


def read_parquet(paths: Sequence[Path], limit: int | None) -> Arrays:
    """The first `limit` images of parquet files with the columns of the Hugging Face hub's `uoft-cs/cifar100`.

    Raises:
        DenseShortcutError: a broken file, a missing column, an image that is cut short or of another size, a label
            outside 0 .. 99; the file and row are named.
    """
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for path in paths:
        table = parquet_table(path)
        wanted = len(table) if limit is None else min(len(table), limit - len(labels))
        rows = zip(table["img"][:wanted], table["fine_label"][:wanted], strict=True)
        for row, (img, label) in enumerate(rows):
            where = f"row {row} of {path}"
            pixels.append(decode(img.as_py(), where, pixels[0].shape if pixels else None))
            labels.append(checked_label(label.as_py(), where))
    if not labels:
        raise DenseShortcutError(f"{paths[0].parent} has parquet files without a row: there is nothing to train on.")
    return Arrays(np.stack(pixels), np.asarray(labels))


def parquet_table(path: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        missing = [column for column in ("img", "fine_label") if column not in names]
        if missing:
            raise DenseShortcutError(
                f"{path} has no column {' and no column '.join(missing)} (it has {', '.join(names)}): "
                "use the layout of uoft-cs/cifar100, img{bytes, path} and fine_label."
            )
        return pq.read_table(path, columns=["img", "fine_label"])
    except (pa.ArrowException, OSError) as error:
        raise DenseShortcutError(
            f"{path} is not a whole parquet file ({first_line(error)}): fetch it again."
        ) from error


def decode(img: Any, where: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """The (H, W, 3) pixels of an encoded image."""
    import io

    content = img.get("bytes") if isinstance(img, dict) else None
    if not isinstance(content, bytes):
        raise DenseShortcutError(f"{where} has no image bytes: column img must hold {{bytes, path}}.")
    try:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except IMAGE_ERRORS as error:
        raise DenseShortcutError(
            f"{where} is not a whole image ({first_line(error)}): replace or remove it."
        ) from error
    if shape is not None and pixels.shape != shape:
        raise DenseShortcutError(f"{where} is {pixels.shape[1]}x{pixels.shape[0]}: all images must be of one size.")
    return pixels


def checked_label(label: Any, where: str) -> int:
    if not isinstance(label, int) or not 0 <= label < 100:
        raise DenseShortcutError(f"{where} has the label {label}: CIFAR-100's fine_label is from 0 to 99.")
    return label


def first_line(error: Exception) -> str:
    """An error's first line without PIL's memory addresses."""
    return str(error).split("\n")[0].split(" <_io")[0].rstrip(". ")


def load_folder(config: TrainConfig) -> tuple[Files, Files, tuple[str, ...]]:
    """DIR/train/CLASS/*.jpg and DIR/val or DIR/test, as torchvision's ImageFolder reads them."""
    if config.data_dir is None:
        raise DenseShortcutError("--data imagefolder needs --data-dir DIR with train/ and val/ or test/ in it.")
    folder = existing_folder(config.data_dir)
    held_out = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or held_out is None:
        raise DenseShortcutError(f"{folder} must hold train/ and val/ (or test/), each with a folder for every class.")
    train, classes = read_folder(folder / "train", config.limit_train)
    test, test_classes = read_folder(held_out, config.limit_test)
    if test_classes != classes:
        differing = sorted(set(classes) ^ set(test_classes))
        raise DenseShortcutError(
            f"{folder / 'train'} and {held_out} differ in the classes {', '.join(differing)}: "
            "give both the same class folders."
        )
    return train, test, classes


def read_folder(folder: Path, limit: int | None) -> tuple[Files, tuple[str, ...]]:
    """The image files of a folder of class folders; a limit takes a fixed random sample of them."""
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:  # no class folder, or one without an image
        raise DenseShortcutError(
            f"{folder} needs a folder with images for every class: {first_line(error)}."
        ) from error
    samples = found.samples
    if limit is not None and limit < len(samples):
        chosen = np.sort(np.random.default_rng(0).permutation(len(samples))[:limit])
        samples = [samples[i] for i in chosen]
    return Files(samples), tuple(found.classes)


def existing_folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise DenseShortcutError(f"{path} is not a folder: give --data-dir the folder of the images.")
    return Path(path)


def worker_error(error: DenseShortcutError) -> DenseShortcutError:
    """The error as it was raised: a loader's worker process wraps it in its traceback."""
    return DenseShortcutError(str(error).rstrip().rsplit("DenseShortcutError: ", 1)[-1])
