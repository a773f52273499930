"""A script that uses every RoI operator gives the same numbers when its import line is swapped."""

from __future__ import annotations

import pytest

import roi
from tests.reference import swapped_import


@pytest.mark.torchvision
@pytest.mark.parametrize(("rois", "size"), [(40, (160, 224)), (7, (97, 131))])
def test_the_numbers_stay(rois: int, size: tuple[int, int]) -> None:
    given = swapped_import.inputs(rois, 6, *size)
    theirs, ours = swapped_import.both(given)
    assert {call.__globals__["roi_pool"].__module__.split(".")[0] for call in theirs.values()} == {"torchvision"}
    assert {call.__globals__["roi_pool"].__module__.split(".")[0] for call in ours.values()} == {"roi"}
    # Nine outputs; gradients of seven operators in one leaf each, of the pyramid's in four.
    assert swapped_import.compare(given) == 9 + 6 + 4


MODULES = {
    "RoIPool": [((7, 5), 1 / 16), (7, 1)],
    "RoIAlign": [((7, 5), 1 / 16, 2), (7, 1, -1, True)],
    "PSRoIPool": [((3, 3), 1 / 16)],
    "PSRoIAlign": [((3, 3), 1 / 16, 2)],
    "MultiScaleRoIAlign": [(["0", "1"], 7, 2), (["0"], (7, 5), -1)],
}


@pytest.mark.torchvision
@pytest.mark.parametrize("name", MODULES)
def test_the_reprs_stay(name: str) -> None:
    import torchvision

    for args in MODULES[name]:
        assert repr(getattr(roi, name)(*args)) == repr(getattr(torchvision.ops, name)(*args))
