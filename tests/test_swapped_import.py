"""A script that uses every RoI operator gives the same numbers when its import line is swapped."""

from __future__ import annotations

import pytest

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
