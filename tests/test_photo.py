"""Reading photos: formats, orientation, sizes, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fpn.demo import photo
from fpn.demo.photo import DEFAULT_PHOTO, PhotoError, model_size, read_photo
from fpn.preprocessing import IMAGENET

ORIENTATION = 0x0112
RED, GREEN = (210, 40, 30), (30, 160, 60)


def two_colors(size: tuple[int, int] = (400, 300)) -> Image.Image:
    """Red, the right half green."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 2, 0, *size))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The pixels near the top left and the bottom right corner."""
    left, right = image.getpixel((5, 5)), image.getpixel((image.width - 6, image.height - 6))
    assert isinstance(left, tuple)
    assert isinstance(right, tuple)
    return [left, right]


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("RGB", "png", 0),
        ("P", "png", 0),
        ("P", "gif", 0),
        ("RGB", "jpg", 4),
        ("CMYK", "tif", 2),
        ("CMYK", "jpg", 6),
        ("YCbCr", "jpg", 4),
        ("RGB", "webp", 8),
        ("RGB", "bmp", 0),
    ],
)
def test_color_modes(tmp_path: Path, mode: str, suffix: str, tolerance: int) -> None:
    path = tmp_path / f"photo.{suffix}"
    two_colors().convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    image = read_photo(path).image
    assert image.mode == "RGB"
    np.testing.assert_allclose(corners(image), [RED, GREEN], atol=tolerance)


@pytest.mark.parametrize(
    ("mode", "suffix", "dark", "bright", "expected"),
    [
        ("1", "png", 0, 1, (0, 255)),
        ("L", "png", 40, 200, (40, 200)),
        ("L", "jpg", 40, 200, (40, 200)),
        ("I;16", "png", 40 * 257, 200 * 257, (40, 200)),
        ("I;16", "tif", 0, 65535, (0, 255)),
        ("I", "tif", -5, 100_000, (0, 255)),
        ("F", "tif", 0.25, 0.75, (0, 255)),
    ],
)
def test_grey(tmp_path: Path, mode: str, suffix: str, dark: Any, bright: Any, expected: tuple[int, int]) -> None:
    path = tmp_path / f"photo.{suffix}"
    image = Image.new(mode, (400, 300), dark)
    image.paste(bright, (200, 0, 400, 300))
    image.save(path)
    np.testing.assert_allclose(corners(read_photo(path).image), [(value,) * 3 for value in expected], atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (400, 300), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (200, 0, 400, 300))
    image.convert(mode).save(tmp_path / "photo.png")
    assert corners(read_photo(tmp_path / "photo.png").image) == [(0, 0, 0), (255, 255, 255)]


def test_half_transparent_pixel_is_blended(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 30), (255, 0, 0, 128)).save(tmp_path / "photo.png")
    np.testing.assert_allclose(corners(read_photo(tmp_path / "photo.png").image)[0], (255, 127, 127), atol=1)


def test_not_finite_grey(tmp_path: Path) -> None:
    values = np.linspace(2.0, 3.0, 1200, dtype=np.float32).reshape(30, 40)
    values[0, :5] = [np.nan, np.inf, -np.inf, np.nan, np.inf]
    Image.fromarray(values).save(tmp_path / "photo.tif")
    image = np.asarray(read_photo(tmp_path / "photo.tif").image)
    assert image[-1, -1, 0] == 255
    assert image[0, 0, 0] == 0
    assert photo.stretch(np.full((2, 2), np.nan)).max() == 0
    assert photo.stretch(np.full((2, 2), 7.0)).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    with Image.open(DEFAULT_PHOTO) as source:
        stored = source.crop((0, 0, 512, 380))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned, upright = tmp_path / f"turned.{suffix}", tmp_path / "upright.png"
    stored.save(turned, exif=exif)
    with Image.open(turned) as image:
        ImageOps.exif_transpose(image).save(upright, exif=Image.Exif())
    assert read_photo(turned).size == ((512, 380) if orientation <= 4 else (380, 512))
    assert read_photo(turned).size == read_photo(upright).size
    np.testing.assert_array_equal(read_photo(turned).image, read_photo(upright).image)


@pytest.mark.parametrize(("orientation", "size"), [(1, (4001, 3000)), (6, (3000, 4001))])
def test_big_jpeg_keeps_its_own_size(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    two_colors((4001, 3000)).save(tmp_path / "photo.jpg", exif=exif)
    read = read_photo(tmp_path / "photo.jpg")
    assert read.size == size
    assert read.image.size == model_size(size)
    np.testing.assert_allclose(corners(read.image), [RED, GREEN], atol=4)
    assert read.scale == pytest.approx((800 / 3000,) * 2, abs=1e-3)


def test_huge_photo(tmp_path: Path) -> None:
    two_colors((12000, 9000)).save(tmp_path / "photo.jpg")
    read = read_photo(tmp_path / "photo.jpg")
    assert (read.size, read.image.size) == ((12000, 9000), (1067, 800))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (800, 800)),
        ((640, 427), (1199, 800)),
        ((427, 640), (800, 1199)),
        ((1920, 1080), (1333, 750)),
        ((12000, 9000), (1067, 800)),
        ((100, 80), (200, 160)),
        ((1, 1), (2, 2)),
        ((12000, 1), (1333, 1)),
        ((1, 3), (2, 6)),
    ],
)
def test_model_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert model_size(size) == expected


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "photo.png")
    read = read_photo(tmp_path / "photo.png")
    assert (read.size, read.image.size) == ((1, 1), (2, 2))
    assert read.image.getpixel((1, 1)) == RED


def test_to_tensor() -> None:
    tensor = photo.to_tensor(two_colors((6, 4)))
    assert tensor.shape == (1, 3, 4, 6)
    assert tensor.dtype == torch.float32
    expected = [(value / 255 - mean) / std for value, mean, std in zip(GREEN, IMAGENET.mean, IMAGENET.std, strict=True)]
    torch.testing.assert_close(tensor[0, :, 0, 5], torch.tensor(expected))


def test_default_photo() -> None:
    read = read_photo(DEFAULT_PHOTO)
    assert (read.name, read.size) == ("astronaut.jpg", (512, 512))
    assert DEFAULT_PHOTO.stat().st_size < 100_000
    assert "public domain" in DEFAULT_PHOTO.with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jpg", None, "No such file"),
        ("empty.jpg", b"", "not an image"),
        ("text.jpg", b"not a photo", "not an image"),
        ("header.png", b"\x89PNG\r\n\x1a\n", ""),
    ],
)
def test_no_photo(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PhotoError, match=name) as raised:
        read_photo(tmp_path / name)
    assert message in str(raised.value)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="cannot read"):
        read_photo(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "webp", "bmp"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_truncated(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"photo.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(PhotoError, match="photo"):
        read_photo(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "webp"])
def test_damaged_bytes_raise_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    two_colors((40, 30)).save(path)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    random = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(60):
        damaged = content.copy()
        damaged[random.integers(0, min(len(content), 200), 3)] = random.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            outcomes["read"] += read_photo(path).image.mode == "RGB"
        except PhotoError:
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 60
    assert outcomes["refused"] > 0


@pytest.mark.parametrize("limit", [30 * 40 - 1, 30 * 20 - 1])  # Pillow warns above its limit, and raises above twice it
def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    before = Image.MAX_IMAGE_PIXELS
    two_colors((40, 30)).save(tmp_path / "photo.png")
    monkeypatch.setattr(photo, "MAX_PIXELS", limit)
    with pytest.raises(PhotoError, match="pixels; make a smaller copy"):
        read_photo(tmp_path / "photo.png")
    assert before == Image.MAX_IMAGE_PIXELS
