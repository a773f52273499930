"""How each source names the entries of a ResNet-FPN: tables of pairs, their names and ours, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

# The fields of the templates below. These stand for themselves:
TEXT_FIELDS = {
    "block": r"\d+",
    "index": r"\d",
    "leaf": r"\w+",
    "rest": r"\d+\..+",
    "trunk": r"(?:conv1|bn1|layer[1-4])\..+",
    "ours": r"(?:bottom_up|lateral|smooth|extra)\..+",
}
# And these count something: what, and (a, b, c) of their number = a + b · levels + c · ours.
NUMBER_FIELDS = {
    "stage": ("stage", (0, 0, 1)),  # layer1 … layer4
    "res": ("stage", (1, 0, 1)),  # res2 … res5
    "child": ("stage", (3, 0, 1)),  # 4 … 7, after conv1, bn1, relu and maxpool
    "top": ("top", (0, 0, 1)),  # 0 is the coarsest level, as in `FPN.lateral`
    "fine": ("top", (-1, 1, -1)),  # 0 is the finest level
    "level": ("top", (5, 0, -1)),  # 5 is P5
    "p": ("p", (0, 0, 1)),  # 6 is P6
    "above": ("p", (-6, 1, 1)),  # P6 comes after the levels, which are counted from the finest
}

Table = tuple[tuple[str, str], ...]  # templates of their names and of ours; the first pair that fits counts

ANCHOR = "bottom_up.layer1.0.conv1.weight"  # an entry that every ResNet has


@dataclass(frozen=True)
class Naming:
    """The names of one source, and the options of its models that are in no name.

    Attributes:
        source: who names so.
        table: their names and ours.
        heads: a pattern of the names that may be left out; `{prefix}` is what stands before all names of the FPN.
        has_pyramid: whether there is a pyramid over the trunk; a classifier has none.
        upsample, smooth_top: as `FPN`'s; None: as the entries of ours suggest.
        extra: the levels above where no entry makes them.
        relu: whether a ReLU stands between P6 and P7.
        channel_order: of the images; None: BGR with stride_in_1x1, as Caffe's checkpoints want it, else RGB.
        msra: whether ungrouped bottlenecks with frozen batch norm have their stride in the 1×1 convolution.
        affine: whether batch norm may come as scale and shift alone, its statistics folded into them.
    """

    source: str
    table: Table
    heads: str
    has_pyramid: bool = True
    upsample: Literal["bilinear", "nearest"] | None = "nearest"
    smooth_top: bool | None = True
    extra: Literal["maxpool"] | None = "maxpool"
    relu: bool = True
    channel_order: Literal["bgr"] | None = None
    msra: bool = False
    affine: bool = False


@dataclass(frozen=True)
class Names:
    """A naming at work: with the prefix that its names have in one checkpoint, and the number of its levels."""

    naming: Naming
    prefix: str
    levels: int

    def ours(self, name: str) -> str | None:
        """Our name for theirs, or None where it names nothing in a ResNet-FPN."""
        if not name.startswith(self.prefix):
            return None
        return self._translate(name.removeprefix(self.prefix), self._to_ours)

    def theirs(self, name: str) -> str | None:
        """Their name for ours, or None where they have none."""
        translated = self._translate(name, self._to_theirs)
        return None if translated is None else self.prefix + translated

    def is_head(self, name: str) -> bool:
        """Whether `name`, theirs, lies beside the FPN."""
        return re.fullmatch(self.naming.heads.replace("{prefix}", re.escape(self.prefix)), name) is not None

    @cached_property
    def _to_ours(self) -> list[tuple[re.Pattern[str], str]]:
        return [(pattern(theirs), ours) for theirs, ours in self.naming.table]

    @cached_property
    def _to_theirs(self) -> list[tuple[re.Pattern[str], str]]:
        return [(pattern(ours), theirs) for theirs, ours in self.naming.table]

    def _translate(self, name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
        ranges = {"stage": range(1, 5), "top": range(self.levels), "p": range(6, 8)}
        for rule, template in rules:
            if found := rule.fullmatch(name):
                fields: dict[str, str | int] = dict(found.groupdict())
                counted = {}
                for field, (what, (start, per_level, sign)) in NUMBER_FIELDS.items():
                    if field in fields:
                        counted[what] = sign * (int(fields[field]) - start - per_level * self.levels)
                if all(number in ranges[what] for what, number in counted.items()):
                    for field, (what, (start, per_level, sign)) in NUMBER_FIELDS.items():
                        fields[field] = start + per_level * self.levels + sign * counted.get(what, 0)
                    return template.format(**fields)
        return None


def pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)  # text, field, text, field, …, text
    fields = [f"(?P<{field}>{TEXT_FIELDS.get(field, '[0-9]{1,2}')})" for field in parts[1::2]]
    return re.compile("".join(a + b for a, b in zip(map(re.escape, parts[::2]), [*fields, ""], strict=True)))


def recognise(names: Collection[str]) -> list[Names]:
    """The namings that fit most of `names`, one for each prefix that fits equally well; none where nothing fits."""
    found: dict[Names, int] = {}
    for naming in NAMINGS:
        anchor = Names(naming, "", 4).theirs(ANCHOR)
        assert anchor is not None
        prefixes = [name.removesuffix(anchor) for name in names if ("." + name).endswith("." + anchor)]
        if not naming.has_pyramid:  # what is left of another source's FPN is no classifier
            prefixes = [prefix for prefix in prefixes if not is_part_of_fpn(prefix, names)]
        for candidate in (Names(naming, prefix, levels) for prefix in prefixes for levels in (1, 2, 3, 4)):
            pairs = [(name, ours) for name in names if (ours := candidate.ours(name)) is not None]
            if not naming.has_pyramid or any(ours.startswith("lateral.") for _, ours in pairs):
                found[candidate] = sum(candidate.theirs(ours) == name for name, ours in pairs)
    best = max(found.values(), default=0)
    first: dict[str, Names] = {}  # of equals for one prefix the first: the fewest levels
    for candidate, count in found.items():
        if count == best:
            first.setdefault(candidate.prefix, candidate)
    return list(first.values())


def is_part_of_fpn(prefix: str, names: Collection[str]) -> bool:
    """Whether a trunk is called as in an FPN. torchvision's `body` alone may also be the trunk of another model."""
    if prefix.endswith("body."):
        around = prefix.removesuffix("body.")
        return any(name.startswith(around) and not name.startswith(prefix) for name in names)
    return prefix.endswith("bottom_up.")


def convolutions(*names: tuple[str, str], conv: str = "", norm: str | None = None) -> Table:
    """The pairs of the neck's convolutions.

    Args:
        names: pairs of their name and ours for a convolution.
        conv: what stands between their name and "weight".
        norm: what stands between their name and the entries of its norm; None where there is no norm.
    """
    if norm is None:
        return tuple((f"{theirs}{conv}.{{leaf}}", f"{ours}.{{leaf}}") for theirs, ours in names)
    with_norm = [
        ((f"{theirs}{conv}.{{leaf}}", f"{ours}.0.{{leaf}}"), (f"{theirs}{norm}.{{leaf}}", f"{ours}.1.{{leaf}}"))
        for theirs, ours in names
    ]
    return tuple(pair for pairs in with_norm for pair in pairs)


def torchvision(conv: str, norm: str | None = None) -> Naming:
    neck = (("fpn.inner_blocks.{fine}", "lateral.{top}"), ("fpn.layer_blocks.{fine}", "smooth.{top}"))
    return Naming(
        source="torchvision",
        table=(
            ("body.{trunk}", "bottom_up.{trunk}"),
            *convolutions(*neck, conv=conv, norm=norm),
            ("fpn.extra_blocks.p{p}.{leaf}", "extra.p{p}.{leaf}"),
        ),
        heads=r"(?!{prefix}(body|fpn)\.).*",
    )


def detectron2_trunk(prefix: str) -> Table:
    block = prefix + "res{res}.{block}."
    ours = "bottom_up.layer{stage}.{block}."
    return (
        (prefix + "stem.conv1.weight", "bottom_up.conv1.weight"),
        (prefix + "stem.conv1.norm.{leaf}", "bottom_up.bn1.{leaf}"),
        (block + "conv{index}.weight", ours + "conv{index}.weight"),
        (block + "conv{index}.norm.{leaf}", ours + "bn{index}.{leaf}"),
        (block + "shortcut.weight", ours + "downsample.0.weight"),
        (block + "shortcut.norm.{leaf}", ours + "downsample.1.{leaf}"),
    )


def detectron2(norm: str | None = None) -> Naming:
    neck = (("fpn_lateral{level}", "lateral.{top}"), ("fpn_output{level}", "smooth.{top}"))
    return Naming(
        source="detectron2",
        table=(
            *detectron2_trunk("bottom_up."),
            *convolutions(*neck, norm=norm),
            ("top_block.p{p}.{leaf}", "extra.p{p}.{leaf}"),
        ),
        heads=r"(?!{prefix}(bottom_up|fpn_lateral\d|fpn_output\d|top_block)\.).*",
        channel_order="bgr",
        msra=True,
    )


def caffe2(norm: str, leaves: dict[str, str]) -> Naming:
    """The names in detectron2's ImageNet files, which are Detectron's; `leaves`: theirs -> PyTorch's."""
    convs = {
        "2a": ("conv1", "bn1"),
        "2b": ("conv2", "bn2"),
        "2c": ("conv3", "bn3"),
        "1": ("downsample.0", "downsample.1"),
    }
    theirs, ours = "res{res}_{block}_branch", "bottom_up.layer{stage}.{block}."
    table = [("conv1_w", "bottom_up.conv1.weight")]
    table += [(f"{theirs}{branch}_w", f"{ours}{conv}.weight") for branch, (conv, _) in convs.items()]
    for leaf, torchs in leaves.items():
        table.append((f"res_conv1_{norm}_{leaf}", f"bottom_up.bn1.{torchs}"))
        table += [(f"{theirs}{branch}_{norm}_{leaf}", f"{ours}{bn}.{torchs}") for branch, (_, bn) in convs.items()]
    return Naming(
        source="detectron2's ImageNet file",
        table=tuple(table),
        heads=r"(fc1000|pred)_[wb]|conv1_b|.*_momentum",  # Caffe's conv1 had a bias; detectron2 ignores it too
        has_pyramid=False,
        upsample=None,
        smooth_top=None,
        extra=None,
        channel_order="bgr",
        msra=True,
        affine=norm == "bn",
    )


def mmdetection(trunk_norm: str, neck_norm: str | None) -> Naming:
    block, ours = "backbone.layer{stage}.{block}.", "bottom_up.layer{stage}.{block}."
    neck = (
        ("neck.lateral_convs.{fine}", "lateral.{top}"),
        ("neck.fpn_convs.{fine}", "smooth.{top}"),
        ("neck.fpn_convs.{above}", "extra.p{p}"),
    )
    return Naming(
        source="mmdetection",
        table=(
            (f"backbone.{trunk_norm}1.{{leaf}}", "bottom_up.bn1.{leaf}"),
            (f"{block}{trunk_norm}{{index}}.{{leaf}}", f"{ours}bn{{index}}.{{leaf}}"),
            ("backbone.{trunk}", "bottom_up.{trunk}"),
            *convolutions(*neck, conv=".conv", norm=neck_norm and f".{neck_norm}"),
        ),
        heads=r"(?!{prefix}(backbone|neck)\.).*",
        relu=False,
    )


def kuangliu(first_layer: str, shortcut: str) -> Naming:
    block, ours = f"layer{first_layer}.{{block}}.", "bottom_up.layer{stage}.{block}."
    return Naming(
        source="kuangliu/pytorch-fpn",
        table=(
            ("toplayer.{leaf}", "lateral.0.{leaf}"),
            ("latlayer{top}.{leaf}", "lateral.{top}.{leaf}"),
            ("smooth{top}.{leaf}", "smooth.{top}.{leaf}"),
            ("conv{p}.{leaf}", "extra.p{p}.{leaf}"),
            (f"{block}{shortcut}.{{index}}.{{leaf}}", f"{ours}downsample.{{index}}.{{leaf}}"),
            (f"{block}conv{{index}}.{{leaf}}", f"{ours}conv{{index}}.{{leaf}}"),
            (f"{block}bn{{index}}.{{leaf}}", f"{ours}bn{{index}}.{{leaf}}"),
            ("conv1.weight", "bottom_up.conv1.weight"),
            ("bn1.{leaf}", "bottom_up.bn1.{leaf}"),
        ),
        heads=r"(?!{prefix}).*",
        upsample="bilinear",
        smooth_top=False,
        extra=None,
    )


OURS = Naming(
    source="fpn-roi",
    table=(("{ours}", "{ours}"),),
    heads=r"(?!{prefix}(bottom_up|lateral|smooth|extra)\.).*",
    upsample=None,
    smooth_top=None,
    extra=None,
)

CAFFE2_LEAVES = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
CAFFE2_LONG_LEAVES = {
    "gamma": "weight",
    "beta": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
}

NAMINGS = (
    OURS,
    torchvision(conv=""),  # until 0.13
    torchvision(conv=".0"),
    torchvision(conv=".0", norm=".1"),
    detectron2(),
    detectron2(norm=".norm"),
    *(mmdetection(trunk, neck) for trunk in ("bn", "gn") for neck in (None, "bn", "gn")),
    *(kuangliu(first, shortcut) for first in ("{stage}", "{res}") for shortcut in ("shortcut", "downsample")),
    Naming(
        source="a classifier (torchvision, timm)",
        table=(("{trunk}", "bottom_up.{trunk}"),),
        heads=r"{prefix}fc\..*",
        has_pyramid=False,
        upsample=None,
        smooth_top=None,
        extra=None,
    ),
    Naming(
        source="an nn.Sequential of a ResNet's children",
        table=(
            ("0.{leaf}", "bottom_up.conv1.{leaf}"),
            ("1.{leaf}", "bottom_up.bn1.{leaf}"),
            ("{child}.{rest}", "bottom_up.layer{stage}.{rest}"),
        ),
        heads=r"{prefix}9\.\w+",
        has_pyramid=False,
        upsample=None,
        smooth_top=None,
        extra=None,
    ),
    Naming(
        source="detectron2's file of a classifier of torchvision's",
        table=detectron2_trunk(""),
        heads=r"{prefix}(linear|stem\.fc)\..*",
        has_pyramid=False,
        upsample=None,
        smooth_top=None,
        extra=None,
    ),
    caffe2("bn", CAFFE2_LEAVES),
    caffe2("bn", CAFFE2_LONG_LEAVES),
    caffe2("gn", CAFFE2_LEAVES),
)
