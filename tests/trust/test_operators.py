"""Random calls of every operator: no crash, no hang, no error that is not announced, the reference's numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings

from roi._problem import memory_format
from tests.reference.comparison import same_bits
from tests.trust.cases import OPERATORS, Case, cases
from tests.trust.conftest import Amounts

pytestmark = pytest.mark.trust


@pytest.fixture
def many(amounts: Amounts, request: pytest.FixtureRequest) -> settings:
    """The same cases in every run, for a failure to be there again; `--hypothesis-seed` is for others."""
    return settings(
        max_examples=-(-amounts.cases // len(OPERATORS)),
        deadline=None,
        derandomize=request.config.getoption("--hypothesis-seed") is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("operator", OPERATORS)
def test_random_calls(operator: str, many: settings, tally: Counter[str], alive: Callable[[], None]) -> None:
    @many
    @given(cases(operator))
    def check(case: Case) -> None:
        alive()
        tally["operator cases"] += 1
        expected = case.expected()
        assert_equals_reference(case, case.direct(), expected)
        if not case.valid:
            tally["of them refused"] += 1
            with pytest.raises(ValueError, match=r"boxes must hold finite coordinates and batch indices in \[0, "):
                case.public(case.maps)
            return
        leaves = [x.detach().requires_grad_() for x in case.maps]
        output = case.public(leaves)
        assert_equals_reference(case, output.detach(), expected)
        grad = torch.randint(0, 5, output.shape, generator=torch.Generator().manual_seed(case.seed)).to(case.dtype) / 4
        gradients = torch.autograd.grad(output, leaves, grad)
        for x, gradient, wanted in zip(leaves, gradients, case.expected_gradients(grad), strict=True):
            assert gradient.dtype == x.dtype
            assert_gradient_equals_reference(case, gradient, wanted)

    check()


def assert_equals_reference(case: Case, output: Tensor, expected: Tensor) -> None:
    assert output.dtype == case.dtype
    assert output.is_contiguous(memory_format=memory_format(case.maps[0]))
    if case.takes_maximum:
        assert same_bits(output, expected.to(case.dtype))
    else:
        # Means of values of at most 1: weights in the boxes' dtype, sums in float32 or float64, rounded once.
        rounding = torch.finfo(case.dtype).eps / 2
        atol = 1e-12 if case.dtype == case.wide_rois.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=atol, equal_nan=True)


def assert_gradient_equals_reference(case: Case, gradient: Tensor, expected: Tensor) -> None:
    if case.takes_maximum:
        assert torch.equal(gradient, expected.to(case.dtype))  # sums of quarters, exact before they are rounded
    else:
        rounding = torch.finfo(case.dtype).eps / 2
        # Of sums without cancellation.
        rtol = 1e-12 if case.dtype == case.wide_rois.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(gradient.double(), expected, rtol=rtol + rounding, atol=rtol)
