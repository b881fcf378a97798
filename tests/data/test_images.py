import io
import os
import struct
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image

from reid3d.data import read_image
from reid3d.data.images import read_picture

SIZE = (128, 64)


def quarters(width=64, height=128, mode="RGB"):
    """Top left red, top right green, bottom left blue, bottom right white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 255, 0, 0
    pixels[: height // 2, width // 2 :] = 0, 255, 0
    pixels[height // 2 :, : width // 2] = 0, 0, 255
    pixels[height // 2 :, width // 2 :] = 255, 255, 255
    return Image.fromarray(pixels).convert(mode)


def corners(pixels):
    return [pixels[y, x].tolist() for y in (8, -8) for x in (8, -8)]


COLOURS = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.jpg"])
def test_an_image_of_the_right_size_is_taken_as_it_is(tmp_path, name):
    quarters().save(tmp_path / name, lossless=True, quality=100)
    pixels = read_image(tmp_path / name, SIZE)
    assert pixels.shape == (128, 64, 3) and pixels.dtype == np.uint8
    assert np.abs(np.array(corners(pixels)) - COLOURS).max() <= (2 if name == "a.jpg" else 0)
    if name == "a.png":
        assert np.array_equal(pixels, np.asarray(quarters()))


@pytest.mark.parametrize(("orientation", "size"), [(1, (300, 1200)), (6, (1200, 300)), (3, (300, 1200))])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_knows_the_size_of_its_file_upright(tmp_path, orientation, size, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (1200, 300)).save(tmp_path / f"a.{suffix}", exif=exif)
    picture = read_picture(tmp_path / f"a.{suffix}", 256)
    assert picture.size == size
    assert picture.pixels.shape[:2] == (size[0] // 4, size[1] // 4)  # a whole factor; the longer side stays above 256
    assert read_picture(tmp_path / f"a.{suffix}", 5000).pixels.shape[:2] == size


@pytest.mark.parametrize("shape", [(8, 8), (20, 60), (300, 100), (640, 1280)])
def test_any_shape_is_resized(tmp_path, shape):
    quarters(*shape).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", SIZE)
    assert pixels.shape == (128, 64, 3)
    assert corners(pixels) == COLOURS


def test_reduction_averages_all_pixels():
    chess = Image.fromarray((np.indices((512, 256)).sum(0) % 2 * 255).astype(np.uint8))
    pixels = read_image(chess, SIZE)
    assert np.abs(pixels.astype(int) - 127).max() <= 2


def test_a_large_jpeg_is_decoded_reduced_to_the_same_picture(tmp_path):
    quarters(3200, 6400).save(tmp_path / "a.jpg")
    assert np.abs(np.array(corners(read_image(tmp_path / "a.jpg", SIZE))) - COLOURS).max() <= 2


def test_a_phones_jpeg_of_two_pictures_gives_the_first(tmp_path):
    quarters().save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (64, 128))], quality=100)
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert np.abs(np.array(corners(read_image(tmp_path / "a.jpg", SIZE))) - COLOURS).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P", "RGBA", "YCbCr"])
def test_colour_modes(tmp_path, mode):
    name = "a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"
    quarters(mode=mode).save(tmp_path / name, quality=100)
    assert np.abs(np.array(corners(read_image(tmp_path / name, SIZE))) - COLOURS).max() <= 2


@pytest.mark.parametrize(("mode", "value", "grey"), [("L", 200, 200), ("1", 1, 255), ("1", 0, 0)])
def test_grey_modes(tmp_path, mode, value, grey):
    Image.new(mode, (64, 128), value).save(tmp_path / "a.png")
    assert np.unique(read_image(tmp_path / "a.png", SIZE)).tolist() == [grey]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.repeat(np.array([0, 257, 25700, 65535], np.uint16), 16)[None].repeat(128, 0)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", SIZE)[0, ::16, 0].tolist() == [0, 1, 100, 255]


def test_sixteen_bit_colour(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">3H", 65535, 25700, 0) * 64
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 64, 128, 16, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(data + chunk(b"IDAT", zlib.compress(row * 128)) + chunk(b"IEND", b""))
    assert np.unique(read_image(tmp_path / "a.png", SIZE).reshape(-1, 3), axis=0).tolist() == [[255, 100, 0]]


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (Image.new("RGBA", (64, 128), (0, 100, 200, 0)), [255, 255, 255]),
        (Image.new("RGBA", (64, 128), (0, 100, 200, 128)), [127, 177, 227]),
        (Image.new("LA", (64, 128), (100, 0)), [255, 255, 255]),
    ],
)
def test_transparency_lies_over_white(tmp_path, picture, colour):
    picture.save(tmp_path / "a.png")
    assert np.unique(read_image(tmp_path / "a.png", SIZE).reshape(-1, 3), axis=0).tolist() == [colour]


def test_palette_transparency_lies_over_white(tmp_path):
    picture = Image.new("P", (64, 128), 1)
    picture.putpalette([9, 9, 9, 10, 20, 30])
    picture.save(tmp_path / "solid.png")
    picture.save(tmp_path / "clear.png", transparency=1)
    assert read_image(tmp_path / "solid.png", SIZE)[0, 0].tolist() == [10, 20, 30]
    assert read_image(tmp_path / "clear.png", SIZE)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("given_as", ["file", "picture"])
def test_exif_orientation_is_honoured(tmp_path, given_as):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn a quarter clockwise
    quarters().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = tmp_path / "a.jpg" if given_as == "file" else Image.open(tmp_path / "a.jpg")
    assert np.abs(np.array(corners(read_image(image, SIZE))) - COLOURS).max() <= 2


@cache
def encoded(kind="JPEG"):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (128, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty file"),
        (b"hello, I am no picture", "not a JPEG, PNG, BMP or WebP image"),
        (encoded("GIF"), "not a JPEG, PNG, BMP or WebP image"),
        (encoded("TIFF"), "not a JPEG, PNG, BMP or WebP image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 128\n", "not a JPEG, PNG, BMP or WebP image"),
        *((encoded(kind)[: len(encoded(kind)) // 2], "broken image: ") for kind in ("JPEG", "PNG", "BMP", "WEBP")),
        (encoded()[:100], "broken image|not a JPEG"),
        (encoded("PNG")[:500] + bytes(500) + encoded("PNG")[1000:], "broken image: "),
    ],
)
def test_files_that_are_no_whole_image(tmp_path, data, words):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=f"^({words})") as caught:
        read_image(tmp_path / "a.jpg", SIZE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", range(1, 40))
def test_no_truncated_header_gets_through(tmp_path, cut):
    for kind in ("JPEG", "PNG", "BMP", "WEBP"):
        (tmp_path / "a.jpg").write_bytes(encoded(kind)[:cut])
        with pytest.raises(ValueError):
            read_image(tmp_path / "a.jpg", SIZE)


@pytest.mark.parametrize("shape", [(1, 1), (7, 128), (64, 7)])
def test_tiny_images_are_refused(tmp_path, shape):
    Image.new("RGB", shape).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", Image.new("RGB", shape)):
        with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} pixels: a side must have at least 8"):
            read_image(image, SIZE)


def test_huge_images_are_refused_before_decoding(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert os.path.getsize(tmp_path / "bomb.png") < 100_000
    with pytest.raises(ValueError, match="more than 50 megapixels"):
        read_image(tmp_path / "bomb.png", SIZE)
    Image.new("1", (7_200, 7_200)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="7200 x 7200 pixels: more than 50 megapixels"):
        read_image(tmp_path / "large.png", SIZE)


def test_a_large_image_is_refused_without_a_warning(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="10000 x 10000 pixels: more than 50 megapixels"):
            read_image(tmp_path / "large.png", SIZE)
    assert seen == []


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "device.jpg", "folder.jpg"):
        with pytest.raises(ValueError, match="^not a regular file$"):
            read_image(tmp_path / name, SIZE)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.jpg"):
        read_image(tmp_path / "no.jpg", SIZE)
