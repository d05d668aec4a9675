import gzip
import hashlib
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from service.images import open_image, prepare
from service.manifest import ImageSpec
from training import data
from training.data import DataError, Dataset, hold_out, load, on_light_ground, random_shift, shift, take


def idx(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


IMAGES = np.arange(5 * 6 * 4, dtype=np.uint8).reshape(5, 6, 4)
LABELS = np.array([0, 1, 2, 1, 0], dtype=np.uint8)
FILES = {"train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(LABELS)}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny published set named `mnist`, served by a mirror on this machine; yields the mirror's folder."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    files = []
    for name, content in FILES.items():
        packed = gzip.compress(content, mtime=0)
        (folder / f"{name}.gz").write_bytes(packed)
        files.append(
            data._IdxFile(name, hashlib.md5(packed).hexdigest(), hashlib.sha256(content).hexdigest())  # noqa: S324 - as published
        )

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    mirrors = ("http://127.0.0.1:9/nobody-listens-here/", f"http://127.0.0.1:{server.server_port}/")
    source = data._IdxSource(
        ("a", "b", "c"), mirrors, {"train": (files[0], files[1]), "test": (files[0], files[1])}
    )
    monkeypatch.setitem(data.IDX_SOURCES, "mnist", source)
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_download(published: Path, tmp_path: Path) -> None:
    """What is missing is fetched from the first mirror that has it, and kept for the next time."""
    dataset = load("mnist", "train", tmp_path / "data")
    assert torch.equal(dataset.images, torch.from_numpy(IMAGES))
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.labels.dtype == torch.int64
    for file in published.iterdir():
        file.unlink()
    assert len(load("mnist", "train", tmp_path / "data")) == 5


def test_altered_download(published: Path, tmp_path: Path) -> None:
    """A mirror that serves something else is not believed, and nothing of it is kept."""
    (published / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES + 1)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: not in .* no mirror served it.*hash"):
        load("mnist", "train", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*images*"))


def test_no_download(published: Path, tmp_path: Path) -> None:
    """Downloading can be ruled out; the error names the file that is missing."""
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: missing"):
        load("mnist", "train", tmp_path, download=False)


@pytest.mark.parametrize("folder", [".", "mnist"])
@pytest.mark.parametrize("pack", [True, False])
def test_own_copy(published: Path, tmp_path: Path, folder: str, pack: bool) -> None:
    """Files compressed again or unpacked, in the folder named or in one named after the set, are taken."""
    (tmp_path / "own" / folder).mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        path = tmp_path / "own" / folder / (f"{name}.gz" if pack else name)
        path.write_bytes(gzip.compress(content, compresslevel=1) if pack else content)
    dataset = load("mnist", "train", tmp_path / "own", download=False)
    assert dataset.checksums == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def test_the_folder_named_after_the_set_comes_first(published: Path, tmp_path: Path) -> None:
    """What lies beside it is not looked at."""
    for name, content in FILES.items():
        (tmp_path / "mnist").mkdir(exist_ok=True)
        (tmp_path / "mnist" / name).write_bytes(content)
        (tmp_path / name).write_bytes(b"of another set")
    assert len(load("mnist", "train", tmp_path, download=False)) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(FILES["train-images-idx3-ubyte"])[:-20], "cannot be read"),
        (b"<html>not here</html>", "cannot be read"),
        (gzip.compress(b""), "starts with nothing, expected 00000803"),
        (gzip.compress(FILES["train-labels-idx1-ubyte"]), "starts with 00000801, expected 00000803"),
        (gzip.compress(FILES["train-images-idx3-ubyte"][:-7]), r"113 bytes of data, expected 120"),
        (gzip.compress(idx(IMAGES + 1)), "sha256 of the content is .* not the published file of mnist"),
    ],
    ids=["truncated", "a web page", "empty", "labels for images", "short", "altered"],
)
def test_damaged_file(published: Path, tmp_path: Path, content: bytes, message: str) -> None:
    """A truncated or altered file is refused by name, with what was found and what was expected."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: {message}"):
        load("mnist", "train", tmp_path)


def test_md5_where_nothing_else_is_published(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set whose content has no published checksum is held to the archive's."""
    source = data.IDX_SOURCES["mnist"]
    images, labels = source.files["train"]
    files = {"train": (data._IdxFile(images.name, images.md5), labels), "test": (images, labels)}
    monkeypatch.setitem(data.IDX_SOURCES, "mnist", data._IdxSource(source.classes, source.mirrors, files))  # type: ignore[arg-type] # plain strings as keys
    assert len(load("mnist", "train", tmp_path)) == 5
    (tmp_path / images.name).write_bytes(FILES[images.name])
    (tmp_path / "mnist" / f"{images.name}.gz").rename(tmp_path / "aside")
    with pytest.raises(DataError, match=r"missing, and not to be downloaded"):
        load("mnist", "train", tmp_path, download=False)  # an unpacked file could be anything
    (tmp_path / "mnist" / f"{images.name}.gz").write_bytes(gzip.compress(idx(IMAGES + 1)))
    with pytest.raises(DataError, match=r"md5 is .*, expected .* not the published file"):
        load("mnist", "train", tmp_path)


def test_unknown_dataset(tmp_path: Path) -> None:
    """An unknown name is answered with the known ones."""
    with pytest.raises(DataError, match=r"dataset is 'cifar', expected one of .*'mnist'.*'folder'"):
        load("cifar", "train", tmp_path)


def write_image(path: Path, mode: str = "L", size: tuple[int, int] = (20, 18), value: object = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)  # type: ignore[arg-type] # a number or a colour


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of grey images, one each."""
    for split in ("train", "test"):
        for label in ("ant", "cat"):
            write_image(tmp_path / split / label / "m.png", value=7)
    return tmp_path


def test_folder_of_grey_images(image_folder: Path) -> None:
    """Folder names are the classes, in order; grey images stay grey; other kinds of files are left."""
    write_image(image_folder / "train" / "cat" / "b.png", value=5)
    write_image(image_folder / "train" / "cat" / "A.BMP", value=9)
    (image_folder / "train" / "ant" / "notes.txt").write_text("not an image")
    dataset = load("folder", "train", image_folder)
    assert dataset.classes == ("ant", "cat")
    assert dataset.images.shape == (4, 18, 20)
    assert dataset.images[:, 0, 0].tolist() == [7, 9, 5, 7]
    assert dataset.labels.tolist() == [0, 1, 1, 1]
    assert len(load("folder", "test", image_folder)) == 2


def test_folder_of_mixed_images(image_folder: Path) -> None:
    """One colour image makes all of them colour."""
    write_image(image_folder / "train" / "cat" / "m.png", "RGB", value=(1, 2, 3))
    dataset = load("folder", "train", image_folder)
    assert dataset.images.shape == (2, 18, 20, 3)
    assert dataset.images[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_checksum_of_a_folder(image_folder: Path) -> None:
    """A folder's checksum changes with an image's content, and with its class."""
    ants, cats = image_folder / "train" / "ant", image_folder / "train" / "cat"
    before = load("folder", "train", image_folder).checksums
    write_image(ants / "m.png", value=1)
    assert load("folder", "train", image_folder).checksums != before
    write_image(ants / "n.png")
    (cats / "m.png").rename(cats / "z.png")
    before = load("folder", "train", image_folder).checksums
    (ants / "n.png").rename(cats / "n.png")  # which is read in the same place
    assert load("folder", "train", image_folder).checksums != before


def test_missing_folder(tmp_path: Path) -> None:
    """A folder that is not there is named, and what should be in it."""
    with pytest.raises(DataError, match=r"train: no such folder; expected one folder of images for each"):
        load("folder", "train", tmp_path)


def test_one_class(image_folder: Path) -> None:
    """One class is nothing to learn."""
    shutil.rmtree(image_folder / "train" / "ant")
    with pytest.raises(DataError, match=r"train: 1 class folders, expected at least 2"):
        load("folder", "train", image_folder)


def test_class_without_images(image_folder: Path) -> None:
    """A class folder without images is named."""
    (image_folder / "train" / "ant" / "m.png").unlink()
    with pytest.raises(DataError, match=r"ant: no images; expected files ending in"):
        load("folder", "train", image_folder)


def test_other_classes_in_the_test_folder(image_folder: Path) -> None:
    """Test images of other classes are found out when the training images are loaded, not hours later."""
    (image_folder / "test" / "ant").rename(image_folder / "test" / "bee")
    with pytest.raises(DataError, match=r"test: .* \['ant'\] are missing and \['bee'\] are not in train"):
        load("folder", "train", image_folder)
    shutil.rmtree(image_folder / "test" / "bee")
    with pytest.raises(DataError, match=r"test: .* \['ant'\] are missing and \[\] are not in train"):
        load("folder", "train", image_folder)


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", "two\u2028lines".encode(), b"tab\t"])
def test_names_that_cannot_be_written(image_folder: Path, name: bytes) -> None:
    """A class whose name is not UTF-8, or would break a line of a card, is named and refused."""
    (image_folder / "train" / "ant").rename(image_folder / "train" / os.fsdecode(name))
    with pytest.raises(DataError, match=r"train: class folder '\w+\\.*', expected a name in UTF-8"):
        load("folder", "train", image_folder)


def test_names_in_any_script(image_folder: Path) -> None:
    """Joiners, spaces and letters of any script are taken in a class's name; in an image's, any byte."""
    name = "\u0645\u06cc\u200c\u0631\u0648\u062f \U0001f41c"  # an ant, with a non-joiner, as Persian needs
    for split in ("train", "test"):
        folder = (image_folder / split / "ant").rename(image_folder / split / name)
        (folder / "m.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    assert load("folder", "train", image_folder).classes == ("cat", name)


def test_image_of_another_size(image_folder: Path) -> None:
    """An image of another size is named, with its size and the expected one."""
    write_image(image_folder / "train" / "cat" / "2.png", size=(21, 18))
    with pytest.raises(DataError, match=r"2.png: 21x18 pixels, expected 20x18 as in .*ant/m.png"):
        load("folder", "train", image_folder)


def test_broken_image(image_folder: Path) -> None:
    """A file that is no image is named."""
    (image_folder / "train" / "cat" / "2.png").write_bytes(b"GIF89a?")
    with pytest.raises(DataError, match=r"2.png: not a readable image"):
        load("folder", "train", image_folder)


def test_damaged_exif(image_folder: Path) -> None:
    """An image to be turned, whose EXIF data hold a text for a number, is named."""
    width, turned = struct.pack(">HHL4s", 0x0100, 2, 4, b"abc"), struct.pack(">HHLHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">LH", 8, 2) + width + turned + bytes(4)
    Image.new("L", (18, 20)).save(image_folder / "train" / "cat" / "2.jpg", exif=exif)
    with pytest.raises(DataError, match=r"2.jpg: not a readable image"):
        load("folder", "train", image_folder)


def test_test_images_are_read_at_the_start(image_folder: Path) -> None:
    """Test images of another size are found out at once, and colour is decided for both splits."""
    write_image(image_folder / "test" / "cat" / "m.png", "RGB", value=(1, 2, 3))
    assert load("folder", "train", image_folder).images.shape == (2, 18, 20, 3)
    write_image(image_folder / "test" / "cat" / "m.png", size=(9, 9))
    with pytest.raises(DataError, match=r"test/cat/m.png: 9x9 pixels, expected 20x18"):
        load("folder", "train", image_folder)


@pytest.mark.parametrize(("ink", "ground"), [(0, 255), (255, 0)])
@pytest.mark.parametrize("mode", ["LA", "L", "1"])
def test_transparency_is_what_the_ink_stands_out_from(
    image_folder: Path, mode: str, ink: int, ground: int
) -> None:
    """Black ink on a transparent ground is on white, white ink on black, as in the service; grey stays so."""
    path = image_folder / "train" / "ant" / "m.png"
    clear = 255 - ink if mode == "1" else 7
    image = Image.new(mode, (20, 18), (clear, 0) if mode == "LA" else clear)
    image.paste((ink, 255) if mode == "LA" else ink, (5, 5, 15, 9))
    if mode != "LA":
        image.info["transparency"] = clear
    image.save(path)
    images = load("folder", "train", image_folder).images
    assert images.ndim == 3, "grey as the others"
    assert images[0].unique().tolist() == [0, 255]
    assert images[0, 0, 0] == ground
    grey = ImageSpec(height=18, width=20, channels=1, polarity="light_on_dark", centring="none")
    seen = prepare(open_image(path.read_bytes(), max_pixels=1000), grey, "none")
    assert np.array_equal(images[0].numpy(), seen)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
@pytest.mark.parametrize("clear", [None, 0], ids=["opaque", "transparent"])
def test_a_palette_of_greys_is_grey(image_folder: Path, name: str, clear: int | None) -> None:
    """So is a GIF of grey levels, which always has a palette; one of a colour is in colour."""
    path = image_folder / "train" / "ant" / name
    levels = (np.indices((18, 20)).sum(axis=0) * 3).astype(np.uint8)
    palette = Image.fromarray(levels).convert("P")
    if clear is None:
        palette.save(path)
    else:
        palette.save(path, transparency=clear)
    images = load("folder", "train", image_folder).images
    assert images.ndim == 3
    levels[0, 0] = 0 if clear is None else 255  # what dark ink stands out from
    assert np.array_equal(images[0].numpy(), levels)
    palette.putpalette([255, 0, 0] * 256)
    palette.save(path)
    assert load("folder", "train", image_folder).images.ndim == 4


def test_one_bit_is_grey(image_folder: Path) -> None:
    """An image of black and white alone makes no colour images of the others."""
    write_image(image_folder / "train" / "ant" / "m.png", "1", value=1)
    images = load("folder", "train", image_folder).images
    assert images.ndim == 3
    assert images[0].unique().tolist() == [255]


def test_deep_images_are_refused(image_folder: Path) -> None:
    """An image of 16 bits is refused rather than cut down to nothing."""
    write_image(image_folder / "train" / "ant" / "m.png", "I;16", value=40000)
    with pytest.raises(DataError, match=r"m.png: I;16 pixels, expected 8 bits a channel"):
        load("folder", "train", image_folder)


def test_hidden_files_are_not_seen(image_folder: Path) -> None:
    """Folders and files that begin with a dot are no classes and no images."""
    (image_folder / "train" / ".ipynb_checkpoints").mkdir()
    (image_folder / "train" / "ant" / "._m.png").write_bytes(b"not an image")
    assert len(load("folder", "train", image_folder)) == 2


def test_shift_by_hand() -> None:
    """Each image moves its own way; what enters repeats the border and what leaves is lost."""
    images = torch.tensor([[[1, 2], [3, 4]]] * 3, dtype=torch.uint8)
    moved = shift(images, torch.tensor([1, 0, 0]), torch.tensor([0, -1, 0]))
    assert moved.tolist() == [[[1, 2], [1, 2]], [[2, 2], [4, 4]], [[1, 2], [3, 4]]]
    assert moved.dtype == torch.uint8


def test_shift_of_colour_images() -> None:
    """The three channels of a pixel move together."""
    images = torch.arange(12, dtype=torch.uint8).reshape(1, 2, 2, 3)
    moved = shift(images, torch.tensor([0]), torch.tensor([1]))
    assert moved.tolist() == [[[[0, 1, 2], [0, 1, 2]], [[6, 7, 8], [6, 7, 8]]]]


def test_random_shift_covers_its_range() -> None:
    """Shifts of up to 2 pixels: all 25 occur, images differ within one batch, and none goes further."""
    images = torch.zeros(2000, 9, 9, dtype=torch.uint8)
    images[:, 4, 4] = 1
    moved = random_shift(images, 2, torch.Generator().manual_seed(0))
    places = {tuple(place) for place in moved.nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_top_and_bottom_tell_the_ground() -> None:
    """Both rows count, and only they, as much as one another."""
    images = torch.zeros(2, 4, 3, dtype=torch.uint8)
    images[:, 1:3] = 255
    assert not on_light_ground(images)
    for light, dark in ((0, -1), (-1, 0)):
        images[:, light], images[:, dark] = 255, 0
        assert not on_light_ground(images)
        images[:, dark] = 1
        assert on_light_ground(images)


def test_digits_are_taken_with_their_images() -> None:
    """Of images of several digits, each keeps its own."""
    numbers = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1)
    dataset = Dataset("pairs", ("a", "b"), numbers, torch.zeros(5, 2), {}, digits=numbers[:, None])
    taken = take(dataset, torch.tensor([3, 1]))
    assert taken.digits is not None
    assert taken.digits.flatten().tolist() == taken.images.flatten().tolist() == [3, 1]


def test_each_class_gives_its_share() -> None:
    """Of the images held out as many are of a class as of all, and no class gives its last one."""
    labels = torch.arange(200) % 10
    labels[:2] = torch.tensor([10, 11])  # once each, as 0 and 1 are in the rest
    dataset = Dataset("numbers", tuple("0123456789ab"), torch.zeros(200, 1, 1, dtype=torch.uint8), labels, {})
    for seed in range(20):
        rest, held = hold_out(dataset, 50, seed)
        counts = held.labels.bincount(minlength=12)
        assert 4 <= counts[:10].min() <= counts[:10].max() <= 6
        assert rest.labels.bincount(minlength=12).min() == 1
        assert len(hold_out(dataset, 199, seed)[0]) == 1


def test_hold_out() -> None:
    """The held-out images and the rest are disjoint, complete, and the same for the same seed."""
    labels = torch.arange(50)
    dataset = Dataset("numbers", ("a", "b"), labels.to(torch.uint8).reshape(50, 1, 1), labels, {})
    rest, held = hold_out(dataset, 12, seed=3)
    assert len(held) == 12
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == list(range(50))
    assert torch.equal(held.images.flatten().long(), held.labels)
    assert held.labels.tolist() == hold_out(dataset, 12, seed=3)[1].labels.tolist()
    assert held.labels.tolist() != hold_out(dataset, 12, seed=4)[1].labels.tolist()
    with pytest.raises(DataError, match=r"50 validation images .* of the 50 of numbers, expected 0 to 49"):
        hold_out(dataset, 50, seed=0)
