"""Images and labels: MNIST, Fashion-MNIST, or a folder of your own images for each class."""

import gzip
import hashlib
import os
import struct
import unicodedata
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pooch
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from service.transparency import flatten

DIGITS = tuple("0123456789")
GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
UNWRITABLE = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode's categories of what no class may have in its name, which goes into cards, tables and headers:
control characters, bytes that are not UTF-8, and breaks of lines and paragraphs."""

Split = Literal["train", "test"]
Layout = Literal["plain", "canvas", "pairs"]
"""How a network sees a data set's images: as they are; each on a larger canvas; two at a time."""


class DataError(Exception):
    """A data set that cannot be used; the message names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Dataset:
    """Images (M, H, W) or (M, H, W, 3) uint8, and their labels (M,) int64 as indices into `classes`.

    Images of L digits each have labels (M, L).
    """

    name: str
    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    checksums: dict[str, str]
    """sha256 of what was read, by file name."""
    layout: Layout = "plain"
    """What `training.compose` has yet to do with these images; nothing, if it has been done."""
    digits: Tensor | None = None
    """Images of several digits: each digit by itself, (M, L, H, W) uint8."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _IdxFile:
    """A published IDX file: `md5` of the .gz on the mirrors, `sha256` of the bytes inside, if known.

    Where it is known, the content is what counts: a file that somebody compressed again, or unpacked, is
    still the file. Otherwise only the published archive is.
    """

    name: str
    md5: str
    sha256: str | None = None


@dataclass(frozen=True)
class _IdxSource:
    classes: tuple[str, ...]
    mirrors: tuple[str, ...]
    files: dict[Split, tuple[_IdxFile, _IdxFile]]


# md5 sums as published with torchvision; sha256 sums of the unpacked MNIST files.
IDX_SOURCES = {
    "mnist": _IdxSource(
        DIGITS,
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        {
            "train": (
                _IdxFile(
                    "train-images-idx3-ubyte",
                    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                ),
                _IdxFile(
                    "train-labels-idx1-ubyte",
                    "d53e105ee54ea40749a09fcbcd1e9432",
                    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                ),
            ),
            "test": (
                _IdxFile(
                    "t10k-images-idx3-ubyte",
                    "9fb629c4189551a2d022fa330f9573f3",
                    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                ),
                _IdxFile(
                    "t10k-labels-idx1-ubyte",
                    "ec29112dd5afa0611ce80d1b7f02629c",
                    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
                ),
            ),
        },
    ),
    "fashion-mnist": _IdxSource(
        GARMENTS,
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        {
            "train": (
                _IdxFile("train-images-idx3-ubyte", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                _IdxFile("train-labels-idx1-ubyte", "25c81989df183df01b3e8a0aad5dffbe"),
            ),
            "test": (
                _IdxFile("t10k-images-idx3-ubyte", "bef4ecab320f06d8554ea6380940ec79"),
                _IdxFile("t10k-labels-idx1-ubyte", "bb300cfdad3c16e7a12a480ee83cd310"),
            ),
        },
    ),
}


def default_data_dir() -> Path:
    """`CAPSNET_DATA_DIR`, or `data` in the current folder."""
    return Path(os.environ.get("CAPSNET_DATA_DIR", "data"))


def load(name: str, split: Split, data_dir: Path | None = None, *, download: bool = True) -> Dataset:
    """Load one split of a data set.

    Args:
        name: `mnist`, `fashion-mnist`, or `folder` for images of your own, laid out as
            `<data_dir>/<split>/<class label>/<any name>.png`.
        split: `train` or `test`.
        data_dir: the folder that holds the files, or a folder `name` that does. Defaults to
            `CAPSNET_DATA_DIR`. What is missing of MNIST and Fashion-MNIST is downloaded into it.
        download: False to raise instead of downloading.

    Raises:
        DataError: naming the file, what was found and what was expected.
    """
    root = default_data_dir() if data_dir is None else data_dir
    if name == "folder":
        return _load_folder(root, split)
    if name not in IDX_SOURCES:
        raise DataError(f"dataset is {name!r}, expected one of {[*IDX_SOURCES, 'folder']}")
    source = IDX_SOURCES[name]
    # All four files now, so that a run does not end on a missing test set.
    files = [file for pair in source.files.values() for file in pair]
    paths = {file.name: _find(root, name, file, source, download) for file in files}
    images_file, labels_file = source.files[split]
    images, images_digest = _read_idx(paths[images_file.name], images_file, 3, name)
    labels, labels_digest = _read_idx(paths[labels_file.name], labels_file, 1, name)
    if len(images) != len(labels):
        raise DataError(f"{root}: {len(images)} images in {images_file.name}, but {len(labels)} labels")
    if labels.max(initial=0) >= len(source.classes):
        raise DataError(f"{labels_file.name}: label {labels.max()}, expected 0 to {len(source.classes) - 1}")
    return Dataset(
        name,
        source.classes,
        torch.from_numpy(images),
        torch.from_numpy(labels.astype(np.int64)),
        {images_file.name: images_digest, labels_file.name: labels_digest},
    )


def _find(root: Path, name: str, file: _IdxFile, source: _IdxSource, download: bool) -> Path:
    endings = (".gz", "") if file.sha256 else (".gz",)
    for folder in (root / name, root):
        for ending in endings:
            candidate = folder / (file.name + ending)
            if candidate.is_file():
                return candidate
    if not download:
        raise DataError(f"{root / name / file.name}.gz: missing, and not to be downloaded; copy it there")
    failures = []
    for mirror in source.mirrors:
        try:
            return Path(
                pooch.retrieve(
                    mirror + file.name + ".gz",
                    known_hash=f"md5:{file.md5}",
                    fname=f"{file.name}.gz",
                    path=root / name,
                    progressbar=True,
                )
            )
        except (OSError, ValueError) as error:  # unreachable mirror; checksum that does not match
            failures.append(f"{mirror}: {error}")
    raise DataError(
        f"{file.name}.gz: not in {root} nor {root / name}, and no mirror served it; copy it there yourself. "
        + "; ".join(failures)
    )


def _read_idx(path: Path, file: _IdxFile, axes: int, name: str) -> tuple[NDArray[np.uint8], str]:
    """One verified IDX file of unsigned bytes and the sha256 of its unpacked content."""
    try:
        packed = path.read_bytes()
        content = gzip.decompress(packed) if path.suffix == ".gz" else packed
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); delete it and it will be downloaded again"
        ) from error
    header = 4 + 4 * axes
    magic = 0x0800 + axes  # 0x08: unsigned bytes
    if len(content) < header or struct.unpack(">I", content[:4])[0] != magic:
        raise DataError(f"{path}: starts with {content[:4].hex() or 'nothing'}, expected {magic:08x} (IDX)")
    shape = struct.unpack(f">{axes}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise DataError(
            f"{path}: {len(content) - header} bytes of data, expected {int(np.prod(shape))} "
            f"for its shape {shape}; delete it and it will be downloaded again"
        )
    digest = hashlib.sha256(content).hexdigest()
    if file.sha256 is not None:
        _require_digest(path, name, "sha256 of the content", digest, file.sha256)
    else:
        md5 = hashlib.md5(packed, usedforsecurity=False).hexdigest()
        _require_digest(path, name, "md5", md5, file.md5)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy(), digest


def _require_digest(path: Path, name: str, kind: str, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(
            f"{path}: {kind} is {found}, expected {expected}; this is not the published file of {name}: "
            "move it away and it will be downloaded again"
        )


def _class_folders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one folder of images for each class in it")
    visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    classes = tuple(sorted(entry.name for entry in visible if entry.is_dir()))
    for name in classes:
        if any(unicodedata.category(character) in UNWRITABLE for character in name):
            raise DataError(
                f"{folder}: class folder {name!r}, expected a name in UTF-8 without line breaks and control "
                "characters; rename it"
            )
    return classes


def _load_folder(root: Path, split: Split) -> Dataset:
    """Images of one size in `<split>/<class label>/`: grey ones stay grey, colour ones become RGB.

    Both splits are read, so that they agree and a run does not end on test images that it cannot use.
    """
    classes, other = _class_folders(root / "train"), _class_folders(root / "test")
    if len(classes) < 2:
        raise DataError(f"{root / 'train'}: {len(classes)} class folders, expected at least 2")
    if classes != other:
        missing, strange = sorted({*classes} - {*other}), sorted({*other} - {*classes})
        raise DataError(
            f"{root / 'test'}: expected the class folders of train, but {missing} are missing and {strange} "
            "are not in train"
        )
    read = {
        path: _read_image(path)
        for folder in (root / "train", root / "test")
        for name in classes
        for path in _image_files(folder / name)
    }
    colour = any(pixels.ndim == 3 for pixels in read.values())  # one makes the whole set colour
    first_path, first = next(iter(read.items()))
    digest = hashlib.sha256()
    images, labels = [], []
    for path, pixels in read.items():
        if pixels.shape[:2] != first.shape[:2]:
            raise DataError(
                f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels, expected {first.shape[1]}x"
                f"{first.shape[0]} as in {first_path}; give all images one size"
            )
        if path.parent.parent == root / split:
            image = np.repeat(pixels[..., None], 3, axis=-1) if colour and pixels.ndim == 2 else pixels
            images.append(image)
            labels.append(classes.index(path.parent.name))
            digest.update(os.fsencode(f"{path.parent.name}/{path.name}") + b"\0" + image.tobytes())
    return Dataset(
        "folder",
        classes,
        torch.from_numpy(np.stack(images)),
        torch.tensor(labels),
        {split: digest.hexdigest()},
    )


def _image_files(folder: Path) -> list[Path]:
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise DataError(f"{folder}: no images; expected files ending in {sorted(IMAGE_SUFFIXES)}")
    return files


def _read_image(path: Path) -> NDArray[np.uint8]:
    """An image as (H, W) or (H, W, 3); what is transparent in it is as the service would see it."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):
                raise DataError(f"{path}: {upright.mode} pixels, expected 8 bits a channel; convert it")
            has_palette = upright.mode in ("P", "PA")
            if upright.has_transparency_data:
                mode = "L" if upright.mode in ("1", "L", "LA") else "RGB"
                upright = flatten(upright.convert("RGBA")).convert(mode)
            pixels = np.asarray(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
            # Pillow and others write grey GIFs, and some PNGs, with a palette of greys.
            if has_palette and (pixels == pixels[..., :1]).all():
                return pixels[..., 0]
            return pixels
    except (OSError, ValueError, TypeError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error})") from error


def take(dataset: Dataset, indices: Tensor) -> Dataset:
    """The images that `indices` (M,) name."""
    return replace(
        dataset,
        images=dataset.images[indices],
        labels=dataset.labels[indices],
        digits=None if dataset.digits is None else dataset.digits[indices],
    )


def sample(dataset: Dataset, count: int | None) -> Dataset:
    """`count` images at even distances, since MNIST's later test images are harder; all if unset.

    Raises:
        DataError: if there are fewer.
    """
    if count is None:
        return dataset
    if not 1 <= count <= len(dataset):
        raise DataError(f"{count} images of {dataset.name} are asked for, expected 1 to {len(dataset)}")
    return take(dataset, torch.arange(count) * len(dataset) // count)


def hold_out(dataset: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off `count` random images, of each class its share: (the rest, the held-out ones).

    No class loses its last image before all others have. The same seed gives the same split.

    Raises:
        DataError: there are not so many images, or none would be left.
    """
    if not 0 <= count < len(dataset):
        raise DataError(
            f"{count} validation images are to be held out of the {len(dataset)} of {dataset.name}, "
            f"expected 0 to {len(dataset) - 1}; see --validation-images"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)
    of_class = dataset.labels.unique(dim=0, return_inverse=True)[1]  # pairs of digits are classes, too
    order = order[of_class[order].argsort(stable=True)]  # class by class
    sizes = of_class.bincount()
    size = sizes.repeat_interleave(sizes)  # (M,): of each image's class
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # in its class
    share = (place + torch.rand(len(order), generator=generator)) / size
    order = order[(share + (place == size - 1)).argsort(stable=True)]
    return take(dataset, order[count:].sort().values), take(dataset, order[:count].sort().values)


def on_light_ground(images: Tensor) -> bool:
    """Whether images (M, H, W[, 3]) show dark ink on a light ground: their top and bottom rows tell."""
    return bool(torch.cat([images[:, 0].flatten(), images[:, -1].flatten()]).float().mean() >= 128)


def shift(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Move each image of (B, H, W[, 3]) down by its `rows` and right by its `columns`, (B,) each.

    What leaves the frame is lost; what enters repeats the border, the background of light and dark images.
    """
    height, width = images.shape[1:3]
    y = torch.arange(height, device=images.device) - rows[:, None]  # (B, H): where each row comes from
    x = torch.arange(width, device=images.device) - columns[:, None]  # (B, W)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images[batch, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]


def random_shift(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """The paper's augmentation: move each image its own way, by up to `most` pixels along each axis.

    But for the border: `shift` repeats it, where the paper pads with zeros. That differs for the 813 of
    MNIST's 60,000 training images that have ink on it.
    """

    def draw() -> Tensor:
        return torch.randint(-most, most + 1, (len(images),), generator=generator, device=images.device)

    return shift(images, draw(), draw())
