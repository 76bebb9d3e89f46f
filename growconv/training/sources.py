"""Where images come from: embedded, computed, on disk, or downloaded with a checksum. Nothing here unpickles.

What is missing, damaged or not what was published is a DataError.
"""

import gzip
import hashlib
import shlex
import struct
import tarfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from growconv.errors import DataError
from growconv.training import pictures

SYSTEM_FOLDERS = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}
DEFAULT_ROOT = "~/.cache/growconv"
MOST_BYTES = 1 << 28
"""No file of the sets here holds more once decompressed (CIFAR-100's training file: 154 MB)."""


class RawData(NamedTuple):
    """Inputs (n, channels, height, width), uint8 for images, else float; targets (n,) int64, or float maps."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int


def digits() -> RawData:
    """scikit-learn's 1797 handwritten digits, 8×8, levels 0 to 16; every fifth one is for the test."""
    package = find_spec("sklearn")  # only its file: importing sklearn.datasets takes as long as importing torch
    if package is None or package.origin is None:
        raise DataError("scikit-learn is not installed", where="data=digits", fix="pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    inputs = torch.from_numpy(np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(table[:, -1].astype(np.int64))
    test = torch.zeros(len(targets), dtype=torch.bool)
    test[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))[: len(targets) // 5]] = True
    return RawData(inputs[~test], targets[~test], inputs[test], targets[test], 10)


def synthetic(
    hidden: int, samples: int, channels: int, outputs: int, image_size: int, activation: str, seed: int
) -> RawData:
    """Gaussian images and what a random conv → activation → conv teacher with `hidden` channels makes of them.

    The targets have mean 0 and variance 1 over the training samples.
    """
    from growconv.training.models import ConvPair

    generator = torch.Generator().manual_seed(seed)
    teacher = ConvPair(
        in_channels=channels, classes=outputs, image_size=image_size, hidden=hidden / 12, activation=activation
    )
    with torch.no_grad():
        for layer in (teacher.conv1, teacher.conv2):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5, generator=generator)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1, generator=generator)
        inputs = torch.randn(samples + max(1, samples // 4), channels, image_size, image_size, generator=generator)
        targets = teacher(inputs)
    targets = (targets - targets[:samples].mean()) / targets[:samples].std()
    return RawData(inputs[:samples], targets[:samples], inputs[samples:], targets[samples:], outputs)


class RemoteFile(NamedTuple):
    """A file to look for: its address, its published MD5, and the SHA-256 of what it holds once decompressed."""

    name: str
    url: str
    md5: str
    content: str | None = None


_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_SUMS = """
train-images-idx3 8d4fb7e6c68d591d4c3dfef9ec88bf0d c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
train-labels-idx1 25c81989df183df01b3e8a0aad5dffbe bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
t10k-images-idx3 bef4ecab320f06d8554ea6380940ec79 5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
t10k-labels-idx1 bb300cfdad3c16e7a12a480ee83cd310 0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34
"""
FASHION_MNIST = {
    name: RemoteFile(f"{name}-ubyte.gz", f"{_FASHION_URL}{name}-ubyte.gz", md5, content)
    for name, md5, content in map(str.split, _FASHION_SUMS.strip().splitlines())
}


class CifarLayout(NamedTuple):
    """The binary version of a CIFAR set: where it is, and how its records are laid out."""

    archive: RemoteFile
    folder: str
    train: tuple[str, ...]
    test: str
    label_bytes: int  # the last of them is the label that counts
    classes: int


_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_TEN, _HUNDRED = "cifar-10-binary.tar.gz", "cifar-100-binary.tar.gz"
_BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
CIFAR = {
    "cifar10": CifarLayout(
        RemoteFile(_TEN, f"{_CIFAR_URL}{_TEN}", "c32a1d4ab5d03f1284b67883e8d87530"),
        "cifar-10-batches-bin", _BATCHES, "test_batch.bin", 1, 10,
    ),
    "cifar100": CifarLayout(
        RemoteFile(_HUNDRED, f"{_CIFAR_URL}{_HUNDRED}", "03b5dce01913d631647c71ecec9e9cb8"),
        "cifar-100-binary", ("train.bin",), "test.bin", 2, 100,
    ),
}  # fmt: skip
CIFAR_RECORDS = (50_000, 10_000)


def fashion_mnist(root: str | Path, download: bool = True) -> RawData:
    """Fashion-MNIST (Xiao et al. 2017): 60 000 and 10 000 grey images of 28×28 pixels in ten classes."""
    images, labels, test_images, test_labels = (
        read_idx(locate("fashion_mnist", remote, Path(root), download), remote.content)
        for remote in FASHION_MNIST.values()
    )
    return _raw(images[:, None], labels, test_images[:, None], test_labels, 10)


def cifar(name: str, root: str | Path, download: bool = True) -> RawData:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), the binary version: 50 000 and 10 000 colour images of 32×32."""
    layout, folder = CIFAR[name], existing_root(root)
    members, parts = (*layout.train, layout.test), []
    if (folder / layout.folder).is_dir() and not (folder / layout.archive.name).is_file():
        for path in (folder / layout.folder / member for member in members):
            if not path.is_file():
                raise DataError("this file of the dataset is missing", where=str(path))
            if path.stat().st_size > MOST_BYTES:
                raise DataError("The file is larger than any file of this data set.", where=str(path))
            parts.append(_cifar_records(layout, path, path.read_bytes()))
    else:
        archive = locate(name, layout.archive, folder, download)
        with archive.open("rb") as stream:
            _compare_digest(archive, hashlib.file_digest(stream, "md5").hexdigest(), layout.archive.md5, "md5")
        with tarfile.open(archive) as opened:
            for member in members:
                stream = cast(IO[bytes], opened.extractfile(f"{layout.folder}/{member}"))  # as it was published
                parts.append(_cifar_records(layout, archive / member, stream.read()))
    images, labels = (np.concatenate(each) for each in zip(*parts[:-1], strict=True))
    test_images, test_labels = parts[-1]
    if (len(images), len(test_images)) != CIFAR_RECORDS:
        got = (len(images), len(test_images))
        raise DataError("records are missing", where=str(folder), expected=CIFAR_RECORDS, got=got)
    for each in (labels, test_labels):  # the unpacked files have no published checksum, but this
        if len(set(np.bincount(each, minlength=layout.classes).tolist())) != 1:
            problem = "The classes do not have equal numbers of images, as they have in the published set."
            raise DataError(problem, where=str(folder))
    return _raw(images, labels, test_images, test_labels, layout.classes)


def _cifar_records(layout: CifarLayout, path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    size = layout.label_bytes + 3 * 32 * 32
    if not content or len(content) % size:
        problem = "the file is truncated or not a CIFAR batch"
        raise _damaged(path, problem, len(content), f"a multiple of {size} bytes")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
    labels = records[:, layout.label_bytes - 1]
    if labels.max() >= layout.classes:
        raise _damaged(path, "a label is out of range", int(labels.max()), f"0 to {layout.classes - 1}")
    return records[:, layout.label_bytes :].reshape(-1, 3, 32, 32), labels


def images(root: str | Path, image_size: int, channels: int) -> RawData:
    """A folder of pictures: root/train/CLASS/*.png and root/test/CLASS/*.png, scaled to squares; see `ImagesConfig`."""
    if channels not in (1, 3):
        raise DataError("images must be grey or in colour", where="data.channels", expected="1 or 3", got=channels)
    folder = existing_root(root)
    names = pictures.class_names(folder / "train")
    pictures.check_classes(names, pictures.class_names(folder / "test"), folder)
    arrays = []
    for part in ("train", "test"):
        classes = [
            pictures.read_class(path, folder, image_size, channels) if path.is_dir() else []
            for path in (folder / part / name for name in names)
        ]
        arrays += [np.stack([picture for each in classes for picture in each])]
        arrays += [np.repeat(np.arange(len(names)), [len(each) for each in classes])]
    return _raw(*arrays, classes=len(names))


def existing_root(root: str | Path) -> Path:
    """The folder that data.root names; the default one is made where it is missing, another one is asked for."""
    folder = Path(root).expanduser()
    if folder == Path(DEFAULT_ROOT).expanduser():
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise DataError(
            "This folder does not exist." if not folder.exists() else "This is not a folder.",
            where=f"data.root={root}",
            fix=f"correct the path, or make the folder: mkdir -p {shlex.quote(str(folder))}",
        )
    return folder


def locate(dataset: str, remote: RemoteFile, root: Path, download: bool) -> Path:
    """The file in the user's root, else in the dataset's system folder, else downloaded into root and checked."""
    root = existing_root(root)
    places = [folder / remote.name for folder in (root, SYSTEM_FOLDERS.get(dataset)) if folder is not None]
    found = next((path for path in places if path.is_file()), None)
    if found is not None:
        return found
    advice = f"put {remote.name} into {root}, or set data.root to the folder that holds it"
    if not download:
        expected = " or ".join(map(str, places))
        raise DataError(f"{remote.name} is missing", where=f"data={dataset}", expected=expected, fix=advice)
    import pooch

    try:
        # Of two processes one downloads; the other waits and finds the file.
        with FileLock(root / f".{remote.name}.lock"):
            return Path(pooch.retrieve(remote.url, known_hash=f"md5:{remote.md5}", fname=remote.name, path=root))
    except Exception as error:  # pooch lets through whatever its transport raises
        got = f"{type(error).__name__}: {error}"
        raise DataError(f"{remote.name} could not be downloaded", where=remote.url, got=got, fix=advice) from error


def read_idx(path: Path, content: str | None = None) -> np.ndarray:
    """An array of bytes from a gzipped IDX file (magic number, sizes, bytes), whose SHA-256 is `content`, if known."""
    try:
        with gzip.open(path) as stream:
            raw = stream.read(MOST_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, "the file is truncated or damaged", error) from error
    if len(raw) > MOST_BYTES:
        raise _damaged(path, "The file is larger than any file of this data set.", None, f"{MOST_BYTES} bytes")
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise _damaged(path, "this is not an IDX file of bytes", raw[:4].hex(), "000008..")
    axes = raw[3]
    header = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", raw[4:header]) if len(raw) >= header else ()
    if len(raw) - header != int(np.prod(shape, dtype=np.int64)):
        raise _damaged(path, "the file is truncated", f"{max(0, len(raw) - header)} bytes", f"{shape} bytes")
    if content is not None:
        _compare_digest(path, hashlib.sha256(raw).hexdigest(), content, "sha256")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _compare_digest(path: Path, got: str, expected: str, algorithm: str) -> None:
    if got != expected:
        problem = "the file is damaged or a different one: its checksum differs"
        raise _damaged(path, problem, got, f"{algorithm} {expected}")


def _damaged(path: Path, problem: str, got: object, expected: object = None) -> DataError:
    fix = "delete it and run again, or copy it again"
    return DataError(problem, where=str(path), expected=expected, got=got, fix=fix)


def _raw(
    images: np.ndarray, labels: np.ndarray, test_images: np.ndarray, test_labels: np.ndarray, classes: int
) -> RawData:
    inputs, test_inputs = (torch.from_numpy(each.copy()) for each in (images, test_images))
    targets, test_targets = (torch.from_numpy(each.astype(np.int64)) for each in (labels, test_labels))
    return RawData(inputs, targets, test_inputs, test_targets, classes)


SOURCES: dict[str, Callable[..., RawData]] = {
    "digits": digits,
    "synthetic": synthetic,
    "fashion_mnist": fashion_mnist,
    "cifar10": lambda **options: cifar("cifar10", **options),
    "cifar100": lambda **options: cifar("cifar100", **options),
    "images": images,
}
