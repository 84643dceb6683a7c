"""A transformer that nobody has seen before is cached as it is: nothing has to be told about it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import omni_cache
from omni_cache import omni_cache_backend

THREADS = 8


class Crossing(nn.Module):
    """Warp and weft, each with weights of its own, attend to both."""

    def __init__(self) -> None:
        super().__init__()
        self.tension = nn.Linear(THREADS, 2 * THREADS)
        self.warp_pick = nn.Linear(THREADS, 3 * THREADS)
        self.weft_pick = nn.Linear(THREADS, 3 * THREADS)

    def forward(self, warp: Tensor, weft: Tensor, pace: Tensor) -> tuple[Tensor, Tensor]:
        slack, pull = self.tension(pace)[:, None].chunk(2, dim=-1)
        tight = F.layer_norm(weft, (THREADS,)) * (1 + pull) + slack
        both = torch.cat([self.warp_pick(warp), self.weft_pick(tight)], dim=1)
        crossed = F.scaled_dot_product_attention(*both.chunk(3, dim=-1))
        count = warp.shape[1]
        return warp + crossed[:, :count], weft + crossed[:, count:]


class Binding(nn.Module):
    """One cloth, woven through."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(THREADS, 3 * THREADS)
        self.tension = nn.Linear(THREADS, THREADS)

    def forward(self, cloth: Tensor, pace: Tensor) -> Tensor:
        tight = F.layer_norm(cloth, (THREADS,)) * (1 + self.tension(pace)[:, None])
        return cloth + F.scaled_dot_product_attention(*self.pick(tight).chunk(3, dim=-1))


class Loom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.thread = nn.Linear(4, THREADS)
        self.crossings = nn.ModuleList(Crossing() for _ in range(3))
        self.bindings = nn.ModuleList(Binding() for _ in range(2))
        self.finish = nn.Linear(THREADS, 4)

    def forward(self, yarn: Tensor, pattern: Tensor, sigma: Tensor) -> Tensor:
        warp, weft, pace = self.start(yarn, pattern, sigma)
        return self.end(self.weave(warp, weft, pace))

    def start(self, yarn: Tensor, pattern: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        return pattern, self.thread(yarn), (sigma[:, None] * torch.arange(THREADS)).cos()

    def weave(self, warp: Tensor, weft: Tensor, pace: Tensor) -> Tensor:
        count = warp.shape[1]
        for crossing in self.crossings:
            warp, weft = crossing(warp, weft, pace)
        cloth = torch.cat([warp, weft], dim=1)
        for binding in self.bindings:
            cloth = binding(cloth, pace)
        return cloth[:, count:]

    def end(self, weft: Tensor) -> Tensor:
        return self.finish(F.layer_norm(weft, (THREADS,)))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "yarn": torch.randn(2, 6, 4, generator=generator),
        "pattern": torch.ones(2, 3, THREADS),
        "sigma": torch.full((2,), 1 - 0.1 * step),
    }


def test_a_transformer_of_ones_own_is_exact_and_then_reused_by_the_formula() -> None:
    torch.manual_seed(0)
    loom = Loom().eval()
    options = {
        "cache": "teacache",
        "coefficients": (1.0, 0.0),
        "rel_l1_thresh": 1e6,
        "inner": "eager",
    }
    compiled = torch.compile(loom, backend=omni_cache_backend, options=options, fullgraph=True)
    with omni_cache.generation(), omni_cache.branch("cond"):
        first, second = compiled(**inputs(0)), compiled(**inputs(1))

    (trajectory,) = omni_cache.summary(loom).trajectories
    assert [step.computed for step in trajectory.steps] == [True, False]
    assert torch.equal(first, loom(**inputs(0)))

    started = loom.start(**inputs(0))
    residual = loom.weave(*started) - started[1]
    expected = loom.end(loom.start(**inputs(1))[1] + residual)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5)
    assert (second - loom(**inputs(1))).norm() > 0.05 * second.norm()


def test_both_its_lists_are_the_loop() -> None:
    report = str(omni_cache.explain(Loom().eval(), **inputs(0)))
    assert "crossings ×3" in report
    assert "bindings ×2" in report
