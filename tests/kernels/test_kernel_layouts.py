"""What the launchers read in place and what they copy first, because that costs a launch."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from omni_cache.kernels import distance

TIMESTEPS = torch.arange(240.0)


@pytest.mark.parametrize(
    ("rider", "copied"),
    [
        pytest.param(TIMESTEPS[3], False, id="one of many"),
        pytest.param(TIMESTEPS[3].expand(2, 77), False, id="expanded over both dimensions"),
        pytest.param(TIMESTEPS[:2, None].expand(2, 77), False, id="expanded over tokens"),
        pytest.param(TIMESTEPS.view(2, 120), False, id="contiguous"),
        pytest.param(TIMESTEPS.view(2, 120)[:, ::3], False, id="evenly strided"),
        pytest.param(TIMESTEPS.view(120, 2).mT, True, id="transposed"),
    ],
)
def test_riders_are_read_in_place_along_one_stride(rider: Tensor, copied: bool) -> None:
    read, count, step = distance._in_one_dimension(rider)
    assert (read.data_ptr() != rider.data_ptr()) == copied
    values = read.as_strided([count], [step])
    assert values.mean() == rider.mean()


@pytest.mark.parametrize(
    ("shape", "order", "copied"),
    [
        pytest.param((4, 6, 8), (0, 1, 2), False, id="contiguous"),
        pytest.param((4, 6, 8), (2, 0, 1), False, id="three dimensions, permuted"),
        pytest.param((4, 6, 8, 3), (0, 3, 1, 2), False, id="channels last"),
        pytest.param((4, 6, 8, 3), (3, 1, 2, 0), False, id="two that stay together"),
        pytest.param((4, 6, 8, 3), (3, 2, 1, 0), True, id="four dimensions, reversed"),
    ],
)
def test_signals_are_read_in_place_along_three_strides(
    shape: tuple[int, ...], order: tuple[int, ...], copied: bool
) -> None:
    previous = torch.randn(shape).permute(order)
    current = torch.randn(previous.shape)
    read = distance._in_three_dimensions(current, previous)
    assert (read[1].data_ptr() != previous.data_ptr()) == copied
    assert torch.equal(read[0].as_strided(read[2], read[3][0]), current.reshape(read[2]))
    assert torch.equal(read[1].as_strided(read[2], read[3][1]), previous.reshape(read[2]))
