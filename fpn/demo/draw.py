"""The picture of a pyramid: the photo and its boxes, a heat map per level, the pooled RoIs."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

Array = NDArray[Any]
Size = tuple[float, float]

DPI = 120
COLORMAP = "magma"  # perceptually uniform
PERCENTILES = (1, 99)
GAMMA = 0.5  # a square root: a few strong cells would leave the rest black
MAX_TILES = 24  # a figure of more would be mostly tiles

INK, GREY, ACCENT = "#1f2430", "#6b7280", "#b45309"
# Bright enough for photos and for the colormap alike: each outline lies on a broader dark one.
BOX_COLORS = ("#4cc9f0", "#ffd166", "#80ed99", "#ff70a6", "#ff9f1c", "#c0a7ff", "#f25c54", "#ffffff")

# The layout, in inches. Panels are placed by hand: automatic layouts shift with every tick label.
MARGIN = 0.45
HEADER = 1.15
PANEL_TITLE = 0.36
GAP = 0.4
COLOR_BAR = 0.78  # with its ticks and its label
MIN_WIDTH, MAX_WIDTH = 9.6, 13.4  # between the margins
MAX_PHOTO_HEIGHT = 6.2
TILES_PER_ROW = 6
MAX_TILE = 1.3
TILE_GAP, TILE_PAIR_GAP = 0.28, 0.08
TILE_LABEL = 0.32
BADGE = 0.22
CAPTION_LINE = 0.19


@dataclass(frozen=True)
class Level:
    """A level of the pyramid.

    Attributes:
        name: e.g. "P2".
        stride: pixels of the model's input per cell.
        cell: (width, height) of a cell in pixels of the original photo.
        features: (C, h, w).
    """

    name: str
    stride: int
    cell: Size
    features: Array


@dataclass(frozen=True)
class Drawing:
    """What the picture shows. Boxes are in pixels of the original photo, whatever the resolution of `image`.

    Attributes:
        image: the photo, (h, w, 3), uint8.
        size: (width, height) of the original photo.
        levels: finest first.
        boxes: x1, y1, x2, y2, (K, 4).
        box_levels: for each box, the index in `levels` of the level that it was pooled from.
        rois: pooled features, (K, C, P, P).
        title: the headline.
        facts: the line under it, shortened where too long, as the next.
        weights: which weights these are; the line under that.
    """

    image: Array
    size: tuple[int, int]
    levels: Sequence[Level]
    boxes: Array
    box_levels: Sequence[int]
    rois: Array
    title: str
    facts: str
    weights: str


def heat_map(features: Array) -> Array:
    """L2 norm over the channels of every cell: (C, H, W) -> (H, W), in the features' unit; NaN where not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        norm = np.sqrt(np.square(features, dtype=np.float64).sum(axis=0))
    return np.where(np.isfinite(norm), norm, np.nan)


def color_range(heat: Array, percentiles: tuple[float, float]) -> tuple[float, float]:
    """The values at two percentiles of the finite part of a heat map; around its value where it is flat."""
    finite = heat[np.isfinite(heat)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(finite, percentiles))
    if high - low <= 1e-6 * abs(high):
        margin = abs(high) / 2 or 0.5
        return max(low - margin, 0.0), high + margin
    return low, high


def save_picture(drawing: Drawing, path: str | PathLike[str]) -> tuple[int, int]:
    """Writes the picture as a PNG file.

    Returns:
        Its (width, height) in pixels.
    """
    with house_style():
        figure = draw(drawing)
        figure.savefig(path, format="png")
        return figure.canvas.get_width_height()


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's matplotlibrc; no warnings about signs the font lacks."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        # File names are no formulas: a dollar in one must not start any.
        matplotlib.rcParams.update({"text.parse_math": False, "text.color": INK, "axes.labelcolor": GREY})
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@dataclass(frozen=True)
class Layout:
    """Sizes in inches, chosen so that the photo and two by two heat maps are equally high."""

    width: float
    photo: Size
    map: Size
    gap: float
    tiles: Sequence[Size]  # one for each box shown
    columns: int  # of tiles
    tile_side: float  # what tiles fit in

    @classmethod
    def of(cls, size: tuple[int, int], levels: int, boxes: Array) -> Layout:
        """The layout for a photo of `size`, a number of levels and the boxes shown, (K, 4)."""
        aspect = min(max(size[0] / size[1], 0.45), 2.2)  # of the panels; a longer photo lies within its panel
        map_rows = math.ceil(levels / 2)
        spare = MAX_WIDTH - 2 * (COLOR_BAR + GAP) + 2 * aspect * PANEL_TITLE * (map_rows - 1) / map_rows
        height = min(MAX_PHOTO_HEIGHT, spare / (aspect * (1 + 2 / map_rows)))
        map_height = (height - PANEL_TITLE * (map_rows - 1)) / map_rows
        content = aspect * height + 2 * (aspect * map_height + COLOR_BAR)
        width = max(MIN_WIDTH, content + 2 * GAP)
        columns = math.ceil(len(boxes) / math.ceil(len(boxes) / TILES_PER_ROW))
        side = min(MAX_TILE, (width - (columns - 1) * TILE_GAP) / columns / 2 - TILE_PAIR_GAP / 2)
        tile_aspects = [min(max((x2 - x1) / (y2 - y1), 0.25), 4.0) for x1, y1, x2, y2 in boxes]
        tiles = [(side * min(1.0, aspect), side / max(1.0, aspect)) for aspect in tile_aspects]
        photo, panel = (aspect * height, height), (aspect * map_height, map_height)
        return cls(width, photo, panel, (width - content) / 2, tiles, columns, side)

    @property
    def tile_row(self) -> float:
        """Height of a row of tiles with its labels."""
        return TILE_LABEL + max(height for _, height in self.tiles) + 0.14


class Page:
    """A figure with axes and text placed in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        rectangle = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(rectangle)

    def text(self, x: float, y: float, text: str, size: float, **style: Any) -> float:
        """Draws `text`, its baseline at y, and returns the x where it ends."""
        artist = self.figure.text(x / self.width, 1 - y / self.height, text, size=size, va="baseline", **style)
        return float(artist.get_window_extent().x1) / float(self.figure.dpi)


def draw(drawing: Drawing) -> Figure:
    """The picture as a matplotlib figure."""
    shown = min(len(drawing.boxes), MAX_TILES)
    layout = Layout.of(drawing.size, len(drawing.levels), drawing.boxes[:shown])
    caption = textwrap.wrap(caption_of(drawing), int(layout.width * 13.5))
    tiles_top = MARGIN + HEADER + layout.photo[1] + 0.62
    caption_top = tiles_top + math.ceil(shown / layout.columns) * layout.tile_row + 0.3
    page = Page(layout.width + 2 * MARGIN, caption_top + len(caption) * CAPTION_LINE + MARGIN - 0.15)

    draw_header(page, drawing)
    draw_photo(page, layout, drawing)
    draw_levels(page, layout, drawing)
    draw_rois(page, layout, drawing, tiles_top)
    for row, line in enumerate(caption):
        page.text(MARGIN, caption_top + row * CAPTION_LINE, line, 9, color=GREY)
    return page.figure


def caption_of(drawing: Drawing) -> str:
    low, high = PERCENTILES
    size = drawing.rois.shape[-1]
    return (
        "Heat maps: L2 norm over the channels of each cell, in units of activation; the colours span a level's "
        f"{low}st to {high}th percentile on a square-root scale, and arrows mark values beyond. Boxes are drawn on the "
        f"level they are pooled from. RoIs: {size}×{size} max-pooled bins beside what they see; the colours span each "
        "RoI's own range."
    )


def draw_header(page: Page, drawing: Drawing) -> None:
    page.text(MARGIN, MARGIN + 0.2, drawing.title, 22, weight="bold")
    length = int(10 * page.width - 20 * MARGIN)  # characters of this size that fit
    page.text(MARGIN, MARGIN + 0.49, shorten(drawing.facts, length), 11, color=GREY)
    page.text(MARGIN, MARGIN + 0.71, shorten(drawing.weights, length), 11, color=ACCENT)


def draw_photo(page: Page, layout: Layout, drawing: Drawing) -> None:
    """The photo with every box, numbered."""
    top = MARGIN + HEADER
    panel_title(page, MARGIN, top, "Photo", f"{drawing.size[0]} × {drawing.size[1]} pixels")
    axes = page.axes(MARGIN, top, *layout.photo)
    show(axes, drawing.image, drawing.size, drawing.size)
    pixels_per_inch = max(drawing.size[0] / layout.photo[0], drawing.size[1] / layout.photo[1])
    badge = BADGE * pixels_per_inch
    for index, box in enumerate(drawing.boxes):
        outline(axes, box, index, 2.2)
    for index, (x, y) in enumerate(place_labels(drawing.boxes, badge, drawing.size)):
        draw_badge(axes, x, y, badge, index)


def draw_levels(page: Page, layout: Layout, drawing: Drawing) -> None:
    """Two columns of heat maps, the boxes on the levels that they were pooled from."""
    for index, level in enumerate(drawing.levels):
        row, column = divmod(index, 2)
        width, height = layout.map
        x = MARGIN + layout.photo[0] + layout.gap + column * (width + COLOR_BAR + layout.gap)
        y = MARGIN + HEADER + row * (height + PANEL_TITLE)
        channels, cells_y, cells_x = level.features.shape
        panel_title(page, x, y, level.name, f"stride {level.stride}   {channels} × {cells_y} × {cells_x}")
        heat = heat_map(level.features)
        low, high = color_range(heat, PERCENTILES)
        axes = page.axes(x, y, width, height)
        covered = (cells_x * level.cell[0], cells_y * level.cell[1])  # the last cells may reach past the photo
        image = show(axes, heat, covered, drawing.size, cmap=COLORMAP, norm=PowerNorm(GAMMA, low, high))
        for number, box in enumerate(drawing.boxes):
            if drawing.box_levels[number] == index:
                outline(axes, box, number, 1.6)
        draw_color_bar(page, image, heat, x + width + 0.1, y, height)


def draw_color_bar(page: Page, image: Any, heat: Array, x: float, y: float, height: float) -> None:
    low, high = image.norm.vmin, image.norm.vmax
    below, above = bool(np.nanmin(heat, initial=low) < low), bool(np.nanmax(heat, initial=high) > high)
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    bar = page.figure.colorbar(
        image, cax=page.axes(x, y, 0.12, height), extend=extend[below, above], extendfrac=0.04,
        ticks=MaxNLocator(4), format=FuncFormatter(lambda value, _: f"{value:.3g}".replace("e+0", "e")),
    )  # fmt: skip
    bar.outline.set_visible(False)
    bar.ax.tick_params(size=2, pad=2, labelsize=8, color=GREY, labelcolor=GREY)
    bar.set_label("L2 norm", size=7.5, labelpad=3)


def draw_rois(page: Page, layout: Layout, drawing: Drawing, top: float) -> None:
    """Rows of tiles: what a box shows of the photo, and its pooled features."""
    size, shown = drawing.rois.shape[-1], len(layout.tiles)
    left_out = f"the first {shown} of {len(drawing.boxes)}" if shown < len(drawing.boxes) else ""
    panel_title(page, MARGIN, top, f"RoIs, pooled to {size} × {size}", left_out)
    for index, (width, height) in enumerate(layout.tiles):
        row, column = divmod(index, layout.columns)
        x = MARGIN + column * (2 * layout.tile_side + TILE_PAIR_GAP + TILE_GAP)
        y = top + row * layout.tile_row + 0.06
        x1, y1, x2, y2 = drawing.boxes[index]
        color, level = box_color(index), drawing.levels[drawing.box_levels[index]].name
        badge = page.axes(x, y, BADGE, BADGE)
        badge.set_axis_off()
        draw_badge(badge, 0, 0, 1, index)
        end = page.text(x + BADGE + 0.07, y + 0.165, level, 10, weight="bold")
        page.text(end + 0.08, y + 0.165, f"{x2 - x1:.4g} × {y2 - y1:.4g} px", 8.5, color=GREY)

        crop = page.axes(x, y + TILE_LABEL, width, height)
        show(crop, drawing.image, drawing.size, drawing.size)
        crop.set(xlim=(x1, x2), ylim=(y2, y1), aspect="auto")
        tile = page.axes(x + width + TILE_PAIR_GAP, y + TILE_LABEL, width, height)
        heat = heat_map(drawing.rois[index])
        show(tile, heat, (1, 1), (1, 1), cmap=COLORMAP, norm=PowerNorm(GAMMA, *color_range(heat, (0, 100))))
        tile.set(aspect="auto")
        for axes in (crop, tile):
            frame(axes, color)


def panel_title(page: Page, x: float, y: float, title: str, detail: str) -> None:
    """A heading over the panel whose top left corner is (x, y)."""
    end = page.text(x, y - 0.1, title, 12.5, weight="bold")
    page.text(end + 0.12, y - 0.1, detail, 9, color=GREY)


def show(axes: Axes, image: Array, covered: Size, visible: Size, **colors: Any) -> Any:
    """`image` over (0, 0) to `covered`, without ticks, cut to (0, 0) to `visible`. y points down."""
    interpolation = "nearest" if image.ndim == 2 else "auto"
    mappable = axes.imshow(image, extent=(0, covered[0], covered[1], 0), interpolation=interpolation, **colors)
    axes.set(xlim=(0, visible[0]), ylim=(visible[1], 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return mappable


def frame(axes: Axes, color: str) -> None:
    """A frame in a box's colour, with a thin dark edge that shows it on white."""
    edge = [withStroke(linewidth=3.8, foreground=INK)]
    border = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, ec=color, lw=2.6, path_effects=edge)
    border.set_clip_on(False)
    axes.add_patch(border)


def outline(axes: Axes, box: Array, index: int, width: float) -> None:
    x1, y1, x2, y2 = box
    edge = [withStroke(linewidth=width + 1.6, foreground="#000000b0")]
    border = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=box_color(index), lw=width, path_effects=edge)
    border.set_clip_on(False)
    axes.add_patch(border)


def draw_badge(axes: Axes, x: float, y: float, side: float, index: int) -> None:
    """A box's number on its colour."""
    square = Rectangle((x, y), side, side, facecolor=box_color(index), edgecolor=INK, lw=0.6, clip_on=False, zorder=4)
    axes.add_patch(square)
    center = (x + side / 2, y + side / 2)
    style: dict[str, Any] = {"size": 9, "weight": "bold", "ha": "center", "va": "center_baseline", "zorder": 5}
    axes.annotate(str(index + 1), center, annotation_clip=False, **style)  # beside a flat photo it is off its axes


def box_color(index: int) -> str:
    return BOX_COLORS[index % len(BOX_COLORS)]


def place_labels(boxes: Array, side: float, size: tuple[int, int]) -> list[Size]:
    """Top left corners of square labels: at a corner of their boxes, or near it where labels would overlap.

    Args:
        boxes: (K, 4), x1, y1, x2, y2.
        side: of a label, in the boxes' unit.
        size: (width, height) that the labels stay within, where they fit.
    """
    room = np.maximum(np.subtract(size, side), 0)
    steps = [np.arange(0, extent + 1e-9, side / 2) for extent in room]
    anywhere = np.stack(np.meshgrid(*steps), axis=-1).reshape(-1, 2)
    placed: list[Size] = []
    for x1, y1, x2, y2 in boxes:
        outside = [(x1, y1 - side), (x1, y2), (x2 - side, y1 - side), (x2 - side, y2), (x2, y1), (x1 - side, y1)]
        inside = [(x1, y1), (x2 - side, y1), (x1, y2 - side), (x2 - side, y2 - side)]
        # A label within a box hides little of a large one; over a small one it would hide all.
        large = min(x2 - x1, y2 - y1) > 4 * side
        wanted = [*outside[:1], *inside, *outside[1:]] if large else [*outside, *inside]
        fitting = [(x, y) for x, y in wanted if 0 <= x <= room[0] and 0 <= y <= room[1]]
        nearest = anywhere[np.argsort(np.square(anywhere - (x1, y1)).sum(axis=1))]
        candidates = np.concatenate([np.reshape(fitting, (-1, 2)), nearest])
        taken = np.array(placed).reshape(-1, 1, 2)
        free = (np.abs(candidates - taken).max(axis=2) >= 0.999 * side).all(axis=0)
        x, y = candidates[np.argmax(free)]  # the first that is free; the first of all where none is
        placed.append((float(x), float(y)))
    return placed


def shorten(text: str, length: int) -> str:
    """`text` in at most `length` characters, the middle left out, and "?" for what no font can draw."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"
