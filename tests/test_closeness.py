"""The comparison that other tests share accepts another order of summation, and no wrong value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closeness import assert_close

VALUES = torch.randn(1000, generator=torch.Generator().manual_seed(0))


def changed(place: int, factor: float) -> torch.Tensor:
    return torch.cat([VALUES[:place], factor * VALUES[place : place + 1], VALUES[place + 1 :]])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_order_of_a_sum_does_not_matter_whatever_its_size(size):
    terms = size * torch.randn(8, 2**16, generator=torch.Generator().manual_seed(1)).numpy()
    forwards, backwards = terms.cumsum(1)[:, -1], terms[:, ::-1].cumsum(1)[:, -1]
    assert forwards.dtype == np.float32 and (forwards != backwards).any()
    assert_close(forwards, backwards)
    assert_close(forwards, terms.astype(float).sum(1))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_an_error_of_a_thousandth_in_one_typical_element_is_seen(size):
    typical = int((VALUES.abs() - VALUES.abs().median()).abs().argmin())
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(size * changed(typical, 1.001), size * VALUES)
    with pytest.raises(AssertionError, match="bias differs by"):
        assert_close({"bias": size * changed(typical, 1.001)}, {"bias": size * VALUES})


def test_gradients_of_one_computation_may_cancel():
    wanted = {"weight": VALUES, "bias": torch.full((4,), 1e-16)}
    assert_close(wanted | {"bias": torch.full((4,), 5e-7)}, wanted)
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(torch.full((4,), 5e-7), wanted["bias"])
    with pytest.raises(AssertionError, match="bias differs by"):
        assert_close(wanted | {"bias": torch.full((4,), 5e-6)}, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_close(value):
    wrong = changed(3, value)
    for found, wanted in ((wrong, VALUES), (VALUES, wrong), (wrong, wrong)):
        with pytest.raises(AssertionError):
            assert_close(found, wanted)


def test_shapes_and_names_count():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(VALUES[None], VALUES)
    with pytest.raises(AssertionError, match="other names: .*b"):
        assert_close({"a": VALUES}, {"a": VALUES, "b": VALUES})
    assert_close(torch.empty(0), torch.empty(0))
