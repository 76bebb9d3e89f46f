"""data=images: every kind of picture is read as what it is, or named; no file holds the run up or takes it over."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from growconv.cli import main
from growconv.errors import DataError
from growconv.training import pictures
from growconv.training.data import load_data
from growconv.training.sources import images

HALF16 = np.full((8, 8), 32768, np.uint16)
LEFT = np.concatenate([np.full((8, 4), 255, np.uint8), np.zeros((8, 4), np.uint8)], axis=1)


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("L", (8, 8), 100).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def first(root, channels=1):
    """The first training picture, (channels, 8, 8)."""
    return images(root, 8, channels).train_inputs[0].numpy().astype(int)


def put(root, picture, name="0.png", **options):
    target = root / "train" / "a"
    (target / "0.png").unlink(missing_ok=True)
    picture.save(target / name, **options)


def transparent():
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # hidden red
    picture.paste((0, 0, 255, 255), (0, 0, 8, 4))
    return picture


def indexed(**options):
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 0, 255, 0])
    picture.info.update(options)
    return picture


@pytest.mark.parametrize(
    ("name", "picture", "options", "grey"),
    [
        ("0.png", Image.fromarray(HALF16), {}, 128),
        ("0.tif", Image.fromarray(HALF16), {}, 128),
        ("0.tif", Image.fromarray(HALF16.astype(">u2")), {}, 128),
        ("0.png", Image.fromarray(np.full((8, 8), 65535, np.uint16)), {}, 255),
        ("0.gif", Image.new("L", (8, 8), 77), {}, 77),
        ("0.bmp", Image.new("L", (8, 8), 77), {}, 77),
        ("0.webp", Image.new("RGB", (8, 8), (77, 77, 77)), {"lossless": True}, 77),
        ("0.png", Image.new("1", (8, 8), 1), {}, 255),
        ("0.png", Image.new("LA", (8, 8), (0, 0)), {}, 255),
        ("0.png", Image.new("LA", (8, 8), (0, 255)), {}, 0),
        ("0.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 0)), {}, 255),
        ("0.tif", Image.new("CMYK", (8, 8), (0, 0, 0, 255)), {}, 0),
    ],
)
def test_a_picture_is_read_at_its_range(name, picture, options, grey, root):
    put(root, picture, name, **options)
    assert abs(first(root).mean() - grey) <= 2


def test_a_grey_map_of_sixteen_bits(root):
    (root / "train" / "a" / "0.png").unlink()
    (root / "train" / "a" / "0.pgm").write_bytes(b"P5 8 8 65535\n" + HALF16.astype(">u2").tobytes())
    assert first(root).mean() == 128


@pytest.mark.parametrize(
    ("picture", "options", "pixel"),
    [
        (indexed(), {}, (0, 255, 0)),
        (indexed(), {"transparency": 1}, (255, 255, 255)),
        (transparent(), {}, (255, 255, 255)),
        (transparent().quantize(4), {}, (255, 255, 255)),
    ],
)
def test_palettes_and_transparency(picture, options, pixel, root):
    put(root, picture, **options)
    assert tuple(first(root, 3)[:, 7, 7]) == pixel


@pytest.mark.parametrize(("orientation", "side"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
@pytest.mark.parametrize("levels", [LEFT, LEFT.astype(np.uint16) * 257])
def test_the_camera_s_turn_is_undone(orientation, side, levels, root):
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(root, Image.fromarray(levels), exif=exif)
    seen = first(root)[0]
    halves = {"left": seen[:, :4], "right": seen[:, 4:], "top": seen[:4], "bottom": seen[4:]}
    assert {name: half.mean() > 200 for name, half in halves.items()}[side]


def test_of_several_pictures_the_first(root):
    frames = [Image.new("L", (8, 8), level) for level in (50, 200)]
    put(root, frames[0], "0.gif", save_all=True, append_images=frames[1:])
    assert first(root).mean() == 50


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height):
    """A few bytes that claim any number of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


BROKEN = {
    "0.tif": encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"),
    "1.tif": encoded(Image.fromarray(np.full((8, 8), 2**30, np.int32)), "TIFF"),
    "0.ppm": b"P6 x y 255\n",
    "1.ppm": b"P6 1000000000 1000000000 255\n",
    "2.ppm": b"",
    "2.png": png_of(100_000, 100_000),
    "3.png": png_of(11_000, 11_000),
    "4.png": encoded(Image.new("L", (64, 64)), "PNG")[:60],
    "0.jpg": b"\xff\xd8\xff\xe0" + bytes(30),
    "1.jpg": b"<html>no picture</html>",
    "2.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%id) (r) file\n",
    "3.jpg": encoded(Image.new("RGB", (8, 8)), "PDF"),
    "0.webp": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    "0.gif": b"GIF89a",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named(name, root):
    (root / "train" / "a" / name).write_bytes(BROKEN[name])
    with pytest.raises(DataError, match=rf"a/{name}: "):
        images(root, 8, 1)


def test_no_pipe_holds_the_run_up(root):
    os.mkfifo(root / "train" / "a" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png: .*no file"):
        images(root, 8, 1)


def test_no_link_leads_out(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    Image.new("L", (8, 8)).save(outside / "secret.png")
    (root / "train" / "a" / "link.png").symlink_to(outside / "secret.png")
    with pytest.raises(DataError, match=r"link\.png: .*leads out"):
        images(root, 8, 1)
    (root / "train" / "a" / "link.png").unlink()
    (root / "train" / "c").symlink_to(outside)
    with pytest.raises(DataError, match=r"c/secret\.png: .*leads out"):
        images(root, 8, 1)
    (root / "train" / "c").unlink()
    (root / "train" / "a" / "again.png").symlink_to(root / "train" / "a" / "0.png")
    (root / "train" / "a" / "loop.png").symlink_to("loop.png")
    with pytest.raises(DataError, match=r"loop\.png"):
        images(root, 8, 1)
    (root / "train" / "a" / "loop.png").unlink()
    through = tmp_path_factory.mktemp("through") / "link"
    through.symlink_to(root)
    assert len(images(through, 8, 1).train_inputs) == 5


def test_no_right_to_read_is_said(root, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "0.png")

    monkeypatch.setattr(pictures.Image, "open", refuse)
    with pytest.raises(DataError, match=r"a/0\.png: .*\n.*Permission denied"):
        images(root, 8, 1)


def test_other_files_are_counted(root):
    for name in ("notes.txt", "b.heic", "c.heic"):
        (root / "train" / "a" / name).write_text("")
    (root / "train" / "a" / ".DS_Store").write_text("")
    with pytest.warns(UserWarning, match=r"train/a: .*2 of \.heic, 1 of \.txt"):
        assert len(images(root, 8, 1).train_inputs) == 4


def test_empty_and_hidden_folders_are_no_classes(root):
    for name in ("c", ".ipynb_checkpoints"):
        (root / "train" / name).mkdir()
    Image.new("L", (8, 8)).save(root / "train" / ".ipynb_checkpoints" / "0.png")
    assert images(root, 8, 1).classes == 2


@pytest.mark.parametrize("kept", [1, 2])
def test_too_few_pictures_are_said_with_the_option_s_name(kept, root):
    for path in [*sorted(root.glob("train/*/*.png"))[kept:], *root.glob("test/b/*.png")]:
        path.unlink()
    with pytest.raises(DataError, match=r"too few samples(.|\n)*data\.root"):
        load_data("images", root=root, image_size=8, channels=1, validation=0.1, augmentation="none", limit=None)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["data.root={root}/none"], "does not exist"),
        (["data.root={root}/train"], "There are no images in data.root"),
        (["data.root={root}", "data.channels=2"], "data.channels"),
        (["data.root={root}", "data.image_size=0"], "data.image_size"),
    ],
)
def test_the_command_line_says_it_in_a_line(overrides, word, root, tmp_path, capsys):
    settings = [override.format(root=root) for override in overrides]
    assert main(["data=images", *settings, "growth=none", f"hydra.run.dir={tmp_path / 'run'}"]) == 1
    assert word in capsys.readouterr().err
