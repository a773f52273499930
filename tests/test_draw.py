"""The picture: its statistics, its layout, and what it survives."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text
from PIL import Image

from fpn.demo import draw

STRIDES = (4, 8, 16, 32)


def make_drawing(size: tuple[int, int] = (320, 240), boxes: int = 4) -> draw.Drawing:
    """A drawing of random features, every box on another level."""
    random = np.random.default_rng(0)
    width, height = size
    levels = [
        draw.Level(f"P{k}", stride, (stride, stride), random.random((8, -(-height // stride), -(-width // stride))))
        for k, stride in enumerate(STRIDES, start=2)
    ]
    corner = random.uniform(0, 0.5, (boxes, 2)) * size
    extent = random.uniform(0.05, 0.5, (boxes, 2)) * size
    return draw.Drawing(
        image=random.integers(0, 256, (height, width, 3), dtype=np.uint8),
        size=size,
        levels=levels,
        boxes=np.concatenate([corner, corner + extent], axis=1),
        box_levels=[index % 4 for index in range(boxes)],
        rois=random.random((boxes, 8, 7, 7)),
        title="FPN18 feature pyramid",
        facts="photo.png   ·   model input 320 × 240",
        weights="Random weights (seed 0)",
    )


@pytest.mark.parametrize("size", [(320, 240), (3000, 20), (20, 3000)])
def test_every_box_has_its_number(size: tuple[int, int]) -> None:
    """Beside a flat photo the badges are off its axes, where matplotlib leaves annotations out."""
    figure = draw.draw(make_drawing(size))
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    badges = [text for text in figure.findobj(Annotation) if text.get_text() in "1234"]
    assert len(badges) == 8  # on the photo and over the tiles
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3].astype(int).sum(axis=2)
    for badge in badges:
        box = badge.get_window_extent(renderer)
        inside = pixels[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)]
        assert inside.min() < 250  # the number is dark
        assert inside.max() > 300  # and what it lies on is not


def test_heat_map_is_the_l2_norm() -> None:
    features = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(draw.heat_map(features), np.linalg.norm(features.astype(np.float64), axis=0))
    assert draw.heat_map(np.full((2, 1, 1), 1e30, np.float32)) == pytest.approx(2**0.5 * 1e30)  # no overflow


def test_heat_map_of_what_is_not_finite() -> None:
    features = np.ones((2, 1, 3))
    features[0, 0] = [np.nan, np.inf, 0.0]
    np.testing.assert_array_equal(draw.heat_map(features), [[np.nan, np.nan, 1.0]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.arange(101.0), (1.0, 99.0)),
        (np.append(np.arange(101.0), np.nan), (1.0, 99.0)),
        (np.full(9, 4.0), (2.0, 6.0)),
        (np.zeros(9), (0.0, 0.5)),
        (np.full(9, np.nan), (0.0, 1.0)),
    ],
)
def test_color_range(values: np.ndarray, expected: tuple[float, float]) -> None:
    assert draw.color_range(values, (1, 99)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "boxes",
    [
        [(10, 10, 90, 90)],
        [(10, 10, 90, 90)] * 8,
        [(0, 0, 1, 1)] * 8,
        [(0, 0, 100, 100), (0, 0, 50, 50), (0, 0, 3, 3)],
        [(99, 99, 100, 100)] * 3,
    ],
)
def test_labels_neither_overlap_nor_leave_the_photo(boxes: list[tuple[float, ...]]) -> None:
    side = 8.0
    placed = draw.place_labels(np.array(boxes, float), side, (100, 100))
    assert len(placed) == len(boxes)
    for x, y in placed:
        assert 0 <= x <= 100 - side
        assert 0 <= y <= 100 - side
    for (x, y), (other_x, other_y) in itertools.combinations(placed, 2):
        assert max(abs(x - other_x), abs(y - other_y)) >= 0.99 * side


def test_labels_where_there_is_no_room() -> None:
    placed = draw.place_labels(np.array([(0, 0, 4, 4)] * 3, float), 8.0, (4, 4))
    assert placed == [(0.0, 0.0)] * 3


def ticks_out_of_range(figure: Figure) -> set[Text]:
    """Labels of ticks that matplotlib keeps, but does not draw."""
    labels = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                labels |= {tick.label1, tick.label2}
    return labels


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((320, 240), 1),
        ((240, 320), 4),
        ((640, 20), 4),
        ((20, 640), 8),
        ((300, 200), 30),
    ],
)
def test_no_text_overlaps_or_leaves_the_page(size: tuple[int, int], boxes: int) -> None:
    drawing = make_drawing(size, boxes)
    with draw.house_style():
        figure = draw.draw(replace(drawing, facts="long name " * 40, weights="weights " * 40))
        figure.canvas.draw()
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        drawn = [
            (text.get_text(), text.get_window_extent()) for text in texts if text not in ticks_out_of_range(figure)
        ]
    assert {"P2", "P3", "P4", "P5", "Photo", "FPN18 feature pyramid"} <= {name for name, _ in drawn}
    page = figure.bbox
    for name, box in drawn:
        assert page.x0 <= box.x0, name
        assert box.x1 <= page.x1, name
        assert page.y0 <= box.y0, name
        assert box.y1 <= page.y1, name
    for (name, box), (other, other_box) in itertools.combinations(drawn, 2):
        across = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
        along = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
        assert min(across, along) <= 1, (name, other)


def test_picture(tmp_path: Path) -> None:
    drawing = make_drawing(boxes=5)
    size = draw.save_picture(drawing, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == size
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for index in range(5):  # outline, badges and frames, in one colour
        color = np.rint(255 * np.array(to_rgb(draw.box_color(index))))
        assert (pixels == color).all(axis=1).sum() > 500, index
    unused = np.rint(255 * np.array(to_rgb(draw.box_color(5))))
    assert (pixels == unused).all(axis=1).sum() < 50


def test_box_is_drawn_on_its_level_only() -> None:
    drawing = make_drawing(boxes=3)
    with draw.house_style():
        figure = draw.draw(drawing)
    heat_maps = [axes for axes in figure.axes if axes.images and axes.images[0].cmap.name == draw.COLORMAP]
    rectangles = [
        [patch.get_bbox().extents for patch in axes.patches if isinstance(patch, Rectangle)] for axes in heat_maps[:4]
    ]
    for level in range(4):
        expected = [box for box, own in zip(drawing.boxes, drawing.box_levels, strict=True) if own == level]
        np.testing.assert_allclose(np.reshape(rectangles[level], (-1, 4)), np.reshape(expected, (-1, 4)))


@pytest.mark.parametrize("values", [(0.0, 1e20, 1e-20, np.nan), (np.inf, -1e30, 0.0, 1.0)])
def test_degenerate_features(tmp_path: Path, values: tuple[float, ...]) -> None:
    drawing = make_drawing(boxes=1)
    pairs = zip(drawing.levels, values, strict=True)
    levels = [replace(level, features=np.full_like(level.features, value)) for level, value in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing = replace(drawing, levels=levels, rois=np.full_like(drawing.rois, values[0]))
        width, height = draw.save_picture(drawing, tmp_path / "picture.png")
    assert width > height > 500


def test_file_names_are_only_text(tmp_path: Path) -> None:
    drawing = replace(make_drawing(boxes=1), facts="a$b$ 照片 new\nline \udcff %_^{}", weights=r"$\frac{.png $")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw.save_picture(drawing, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_users_style_neither_matters_nor_changes(tmp_path: Path) -> None:
    draw.save_picture(make_drawing(), tmp_path / "plain.png")
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "red", "figure.dpi": 50}):
        draw.save_picture(make_drawing(), tmp_path / "styled.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [("short", 5, "short"), ("abcdefghij", 5, "ab…ij"), ("a\nb\x00c", 9, "a?b?c"), ("abcdefghij", 6, "abc…ij")],
)
def test_shorten(text: str, length: int, expected: str) -> None:
    assert draw.shorten(text, length) == expected
