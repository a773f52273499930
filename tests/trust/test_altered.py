"""Altered models: fusing, freezing and checkpointing change no number, wherever what was put in."""

from __future__ import annotations

import random
import warnings
from collections import Counter

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.trust.altered import problems
from tests.trust.conftest import Amounts

pytestmark = [pytest.mark.trust, pytest.mark.filterwarnings("ignore")]


def test_altered_models(amounts: Amounts, tally: Counter[str]) -> None:
    @settings(
        max_examples=max(20, amounts.cases // 40), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def search(draw: random.Random) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = problems(draw)
            except (RuntimeError, IndexError):  # a model that itself does not run, such as padding more than a map has
                assume(False)
        tally["altered models"] += 1
        assert found == []

    search()
