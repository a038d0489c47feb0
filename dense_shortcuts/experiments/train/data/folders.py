"""Folders of images: one folder a class, and Tiny ImageNet as its own zip lays it out."""

from pathlib import Path

from ....errors import DenseShortcutError
from ..config import TrainConfig
from .images import Files, Kept, existing_folder, first_line, sample

ANNOTATIONS = "val_annotations.txt"


def load_folder(config: TrainConfig) -> tuple[Files, Files, tuple[str, ...]]:
    """DIR/train/CLASS/*.jpg and DIR/val or DIR/test, as torchvision's ImageFolder reads them.

    Raises:
        DenseShortcutError: no such folders, one without images, or other classes in one than in the other.
    """
    if config.data_dir is None:
        raise DenseShortcutError("--data imagefolder needs --data-dir DIR with train/ and val/ or test/ in it.")
    folder = existing_folder(config.data_dir, "--data imagefolder")
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
    return Files([found.samples[i] for i in sample(limit, len(found.samples))]), tuple(found.classes)


def load_tiny_imagenet(config: TrainConfig) -> tuple[Kept, Kept, tuple[str, ...]]:
    """Tiny ImageNet: the unpacked zip, the same sorted into class folders, or the hub's parquet files.

    Raises:
        DenseShortcutError: none of these, or a broken list of the test images.
    """
    from .parquet import load_parquet, parts_of

    folder = existing_folder(config.data_dir, "Tiny ImageNet")
    folder = folder / "tiny-imagenet-200" if (folder / "tiny-imagenet-200").is_dir() else folder
    if (folder / "val" / ANNOTATIONS).is_file():
        train, classes = read_folder(folder / "train", config.limit_train)
        return train, read_annotated(folder / "val", classes, config.limit_test), classes
    if (folder / "train").is_dir():
        return load_folder(config)
    if parts_of(folder, None, "train", ".parquet"):
        return load_parquet(config)
    raise DenseShortcutError(
        f"{folder} has neither train/ and val/ nor train*.parquet: unpack tiny-imagenet-200.zip there."
    )


def read_annotated(folder: Path, classes: tuple[str, ...], limit: int | None) -> Files:
    """The test images of the zip: all in images/, their classes in a list of lines `name, class, box` with tabs."""
    samples = []
    for number, line in enumerate((folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines(), 1):
        name, label = [*line.split("\t"), ""][:2]
        if label not in classes:
            raise DenseShortcutError(
                f"line {number} of {folder / ANNOTATIONS} has the class {label!r}, which train/ lacks: "
                "unpack the zip again."
            )
        samples.append((str(folder / "images" / name), classes.index(label)))
    return Files([samples[i] for i in sample(limit, len(samples))])
