"""Where datasets come from: parsing, checksums, downloads, folders."""

import gzip
import hashlib
import io
import struct
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from growconv.errors import DataError
from growconv.training import sources
from growconv.training.data import load_data
from growconv.training.options import StoredConfig
from tests.training.test_data import COMMON


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A tiny stand-in for Fashion-MNIST in data.root, with its own checksums and no system folder."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3": rng.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        "train-labels-idx1": rng.integers(0, 10, 40, dtype=np.uint8),
        "t10k-images-idx3": rng.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1": rng.integers(0, 10, 20, dtype=np.uint8),
    }
    remote = {}
    for name, array in arrays.items():
        packed = idx(array)
        (tmp_path / f"{name}-ubyte.gz").write_bytes(packed)
        remote[name] = sources.RemoteFile(
            f"{name}-ubyte.gz", "http://localhost:9/none", "0" * 32, hashlib.sha256(gzip.decompress(packed)).hexdigest()
        )
    monkeypatch.setattr(sources, "FASHION_MNIST", remote)
    monkeypatch.setattr(sources, "SYSTEM_FOLDERS", {})
    return tmp_path, arrays


def test_teacher_is_reproducible_and_realisable():
    options = {
        "hidden": 4,
        "samples": 50,
        "channels": 2,
        "outputs": 3,
        "image_size": 6,
        "activation": "tanh",
        "seed": 3,
    }
    first, second = (sources.synthetic(**options) for _ in range(2))
    assert torch.equal(first.train_targets, second.train_targets)
    assert first.train_targets.shape == (50, 3, 6, 6)
    torch.testing.assert_close(first.train_targets.std(), torch.tensor(1.0))
    other = sources.synthetic(**options | {"seed": 4})
    assert not torch.equal(first.train_targets, other.train_targets)


def test_fashion_mnist_is_read_from_the_root(fashion):
    root, arrays = fashion
    raw = sources.fashion_mnist(root)
    assert torch.equal(raw.train_inputs[:, 0], torch.from_numpy(arrays["train-images-idx3"]))
    assert raw.test_targets.tolist() == arrays["t10k-labels-idx1"].tolist()


def test_damaged_files_are_named(fashion):
    root, arrays = fashion
    path = root / "train-images-idx3-ubyte.gz"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: the file is truncated"):
        sources.fashion_mnist(root)
    path.write_bytes(idx(255 - arrays["train-images-idx3"]))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: .*checksum differs"):
        sources.fashion_mnist(root)
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x03" + struct.pack(">3I", 40, 28, 28) + b"\x00" * 100))
    with pytest.raises(DataError, match=r"truncated"):
        sources.fashion_mnist(root)
    path.write_bytes(gzip.compress(b"no idx file at all"))
    with pytest.raises(DataError, match="not an IDX file"):
        sources.fashion_mnist(root)
    path.unlink()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is missing"):
        sources.fashion_mnist(root, download=False)


def test_download_checks_what_arrives(fashion, tmp_path_factory, monkeypatch):
    """Served from a folder through file://, which pooch's own checksum comparison guards."""
    served, _ = fashion
    target = tmp_path_factory.mktemp("downloaded")
    good = {
        name: remote._replace(
            url=(served / remote.name).as_uri(), md5=hashlib.md5((served / remote.name).read_bytes()).hexdigest()
        )
        for name, remote in sources.FASHION_MNIST.items()
    }
    import pooch
    import pooch.downloaders

    def copy(url, output, _pooch):
        with open(url.removeprefix("file://"), "rb") as source, open(output, "wb") as stream:
            stream.write(source.read())

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda url, progressbar=False: copy)
    monkeypatch.setattr(sources, "FASHION_MNIST", good)
    assert len(sources.fashion_mnist(target).train_inputs) == 40
    assert (target / "train-images-idx3-ubyte.gz").is_file()
    first = next(iter(good))
    monkeypatch.setattr(sources, "FASHION_MNIST", good | {first: good[first]._replace(md5="1" * 32)})
    (target / good[first].name).unlink()
    with pytest.raises(DataError, match="could not be downloaded"):
        sources.fashion_mnist(target)
    assert not (target / good[first].name).exists()


def test_a_bomb_does_not_take_its_memory(fashion, monkeypatch):
    root, _ = fashion
    monkeypatch.setattr(sources, "MOST_BYTES", 1 << 20)
    (root / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(1 << 22)))
    with pytest.raises(DataError, match="larger than any file"):
        sources.fashion_mnist(root)


def test_a_root_that_does_not_exist_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(DataError, match=r"data\.root="):
            sources.fashion_mnist(root)
        with pytest.raises(DataError, match=r"data\.root="):
            sources.cifar("cifar10", root, download=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.existing_root(sources.DEFAULT_ROOT).is_dir()
    assert StoredConfig().root == sources.DEFAULT_ROOT


def test_two_downloads_at_once_do_not_collide(fashion, tmp_path_factory, monkeypatch):
    """Two threads ask for the same missing file: it is fetched once, and both find it whole."""
    served, _ = fashion
    target, fetched = tmp_path_factory.mktemp("downloaded"), []
    remote = next(iter(sources.FASHION_MNIST.values()))
    content = (served / remote.name).read_bytes()
    import pooch

    def slowly(url, output, _pooch):
        fetched.append(url)
        time.sleep(0.2)
        Path(output).write_bytes(content)

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda url, progressbar=False: slowly)
    remote = remote._replace(md5=hashlib.md5(content).hexdigest())
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: sources.locate("other", remote, target, True), range(2)))
    assert [path.read_bytes() for path in found] == [content] * 2
    assert len(fetched) == 1


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_folder_and_archive(name, tmp_path, monkeypatch):
    layout = sources.CIFAR[name]
    rng = np.random.default_rng(1)
    each, held = (20, 10) if layout.classes == 10 else (100, 100)
    monkeypatch.setattr(sources, "CIFAR_RECORDS", (each * len(layout.train), held))
    folder = tmp_path / layout.folder
    folder.mkdir()
    contents = {}
    for member in (*layout.train, layout.test):
        count = held if member == layout.test else each
        records = rng.integers(0, layout.classes, (count, layout.label_bytes + 3072))
        records[:, layout.label_bytes - 1] = np.arange(count) % layout.classes
        contents[member] = records.astype(np.uint8)
        (folder / member).write_bytes(contents[member].tobytes())
    raw = sources.cifar(name, tmp_path)
    assert raw.classes == layout.classes
    assert raw.test_targets.tolist() == contents[layout.test][:, layout.label_bytes - 1].tolist()
    expected = contents[layout.train[0]][0, layout.label_bytes :].reshape(3, 32, 32)
    assert np.array_equal(raw.train_inputs[0].numpy(), expected)

    root = tmp_path / "archived"
    root.mkdir()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder, layout.folder)
    (root / layout.archive.name).write_bytes(packed.getvalue())
    with pytest.raises(DataError, match="checksum differs"):
        sources.cifar(name, root)
    right = layout.archive._replace(md5=hashlib.md5(packed.getvalue()).hexdigest())
    monkeypatch.setitem(sources.CIFAR, name, layout._replace(archive=right))
    assert torch.equal(sources.cifar(name, root).train_inputs, raw.train_inputs)

    (folder / layout.test).write_bytes(contents[layout.test].tobytes()[:-1])
    with pytest.raises(DataError, match="truncated"):
        sources.cifar(name, tmp_path)
    (folder / layout.test).write_bytes(contents[layout.test][:-1].tobytes())
    with pytest.raises(DataError, match="records are missing"):
        sources.cifar(name, tmp_path)
    another = contents[layout.test].copy()
    another[0, layout.label_bytes - 1] = 1
    (folder / layout.test).write_bytes(another.tobytes())
    with pytest.raises(DataError, match="equal numbers"):
        sources.cifar(name, tmp_path)
    contents[layout.test][0, layout.label_bytes - 1] = layout.classes
    (folder / layout.test).write_bytes(contents[layout.test].tobytes())
    with pytest.raises(DataError, match="label is out of range"):
        sources.cifar(name, tmp_path)


def test_folder_of_pictures(tmp_path):
    for part, count in (("train", 6), ("test", 2)):
        for value, name in enumerate(["cat", "dog"]):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 10), (50 * value + number, 0, 0)).save(tmp_path / part / name / f"{number}.png")
    data = load_data("images", root=tmp_path, image_size=8, channels=3, **COMMON | {"validation": 0.25})
    assert data.train.inputs.shape[1:] == (3, 8, 8)
    assert (len(data.train), len(data.validation), len(data.test), data.classes) == (9, 3, 4, 2)
    (tmp_path / "train" / "dog" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png"):
        sources.images(tmp_path, 8, 3)
    with pytest.raises(DataError, match="This folder does not exist"):
        sources.images(tmp_path / "nowhere", 8, 3)
    (tmp_path / "train" / "dog" / "broken.png").unlink()
    (tmp_path / "test" / "bird").mkdir()
    assert sources.images(tmp_path, 8, 3).classes == 2  # an empty folder is no class
    Image.new("L", (4, 4)).save(tmp_path / "test" / "bird" / "0.png")
    with pytest.raises(DataError, match="bird"):
        sources.images(tmp_path, 8, 3)
