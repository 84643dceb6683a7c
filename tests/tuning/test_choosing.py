"""Which of several plans is chosen, and what is said where none does what was asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from omni_cache.quality import Fidelity
from omni_cache.strategies.plans import Point
from omni_cache.tuning.improve import spread
from omni_cache.tuning.judge import Candidate, Played, Target, choose, undominated
from omni_cache.tuning.results import Result

NUMBERS = [40.0, 42.0, 44.0, 46.0, 48.0]


def candidate(
    computed: int,
    predicted: float,
    judged: float | None = None,
    seconds: float = 1.0,
    skipped: int = 0,
) -> Candidate:
    """One whose qualities lie 4 dB around those given."""
    actions = ("compute",) * computed + ("skip",) * skipped
    point = Point(actions + ("reuse",) * (10 - len(actions)), 3, {})
    return Candidate(
        point, around(predicted), around(predicted if judged is None else judged, seconds)
    )


def around(psnr: float, seconds: float = 1.0) -> Played:
    fidelities = [Fidelity(psnr + each - 44.0, (psnr + each - 44.0) / 100) for each in NUMBERS]
    return Played(tuple(fidelities), seconds)


FRONTIER = [
    candidate(2, 38.0, seconds=0.2),
    candidate(4, 45.2, 44.0, seconds=0.4),
    candidate(6, 46.0, 45.5, seconds=0.5),
    candidate(8, 52.0, seconds=0.8),
]


def chosen(frontier: Sequence[Candidate] = FRONTIER, **target: float) -> int:
    place, warning = choose(frontier, Target(**target), 1.0)
    assert warning is None
    return frontier[place].computed


def test_the_cheapest_that_meets_a_quality_with_a_margin_and_as_judged() -> None:
    assert chosen(psnr=37.0) == 2
    assert chosen(psnr=37.9) == 4  # 38 is no margin
    assert chosen(psnr=45.0) == 6  # 45.2 predicted is no margin, and 44 was judged
    assert chosen(psnr=45.6) == 8  # 46 predicted is no margin


def test_confidence_asks_of_most_samples_what_is_asked_of_the_median_otherwise() -> None:
    assert chosen(psnr=41.0) == 4
    # The 10th percentile lies 3.2 dB below the median.
    assert chosen(psnr=41.0, confidence=0.9) == 6
    assert chosen(psnr=42.5, confidence=0.9) == 8


def test_ssim_is_a_quality_too() -> None:
    assert chosen(ssim=0.45) == 6  # 0.44 was judged
    assert chosen(ssim=0.4598) == 8  # 0.46 predicted is no margin


def test_the_best_that_is_fast_enough_or_computes_no_more() -> None:
    assert chosen(speedup=2.0) == 6
    assert chosen(speedup=2.4) == 4
    assert chosen(computed_steps=7) == 6
    assert chosen() == 8


@pytest.mark.parametrize(
    ("target", "place", "message"),
    [
        (
            {"psnr": 60.0},
            3,
            "no plan reaches psnr=60.*8 steps.*reaches 52 on the .* and 52 on the judged",
        ),
        ({"ssim": 0.999}, 3, "no plan reaches ssim=0.999"),
        ({"speedup": 9.0}, 0, "no plan is 9 times as fast as uncached; the fastest, 5.00 times"),
        ({"computed_steps": 1}, 0, "no plan computes only 1 steps; 2 is the least"),
    ],
)
def test_what_nothing_meets_is_said(target: dict[str, float], place: int, message: str) -> None:
    found, warning = choose(FRONTIER, Target(**target), 1.0)
    assert found == place
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(warning)


def test_judged_results_that_equal_uncached_ones_do_not_hide_a_prediction_that_is_short() -> None:
    equal = Played((Fidelity(None, None),) * 3, 1.0)
    found, warning = choose([Candidate(FRONTIER[1].point, around(44.0), equal)], Target(45.0), 1.0)
    assert found == 0
    assert warning is not None
    assert "reaches 44 on the samples that made it and equals uncached on the judged" in warning


def test_a_frontier_rises() -> None:
    worse, cheaper = candidate(7, 45.0), candidate(4, 45.2, skipped=3)
    found = undominated([*FRONTIER[::-1], worse, cheaper])
    assert [(each.computed, each.point.actions.count("skip")) for each in found] == [
        (2, 0),
        (4, 3),
        (6, 0),
        (8, 0),
    ]
    psnr = [each.judged.quality.psnr for each in found]
    assert psnr == sorted(psnr)


def test_what_skips_is_cheaper_by_what_a_reused_step_takes() -> None:
    """Where a reused step takes half of a computed one, 5 + 5/2 steps are more than 6 + 1/2."""
    reuses, skips = candidate(5, 45.0, seconds=0.75), candidate(6, 46.0, seconds=0.65, skipped=3)
    whole = candidate(10, 44.0, seconds=1.0)
    assert undominated([reuses, skips]) == [reuses, skips]
    assert undominated([reuses, skips], 1.0) == [skips]
    assert undominated([whole, reuses], 1.0) == [reuses]  # nothing reused tells nothing


def test_a_plan_that_was_refined_pushes_none_out_by_its_prediction() -> None:
    refined, other = candidate(6, 51.0, 47.0), candidate(8, 50.0, 48.0)
    assert undominated([refined, other]) == [refined, other]


@pytest.mark.parametrize(
    ("steps", "first", "counts"),
    [
        (28, 1, [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14]),
        (28, 4, [4, 5, 6, 7, 8, 10, 12, 14]),
        (50, 7, [7, 8, 10, 12, 14, 17, 20, 24, 29]),
        (4, 1, [1, 2]),
        (3, 2, [2]),
        (1, 1, [1]),
    ],
)
def test_the_frontier_has_fewer_numbers_where_they_are_large(
    steps: int, first: int, counts: list[int]
) -> None:
    assert spread(steps, first) == counts


def test_integers_become_floats_before_they_are_compared() -> None:
    black, white = (np.full((8, 8, 3), value, dtype=np.uint8) for value in (0, 255))
    for first, second in (
        (black, white),
        (Image.fromarray(black), Image.fromarray(white)),
        ([Image.fromarray(black)], [white]),
        (torch.from_numpy(black), torch.from_numpy(white)),
        (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)),
    ):
        fidelity = Result.of(first).fidelity(Result.of(second))
        assert fidelity.psnr == pytest.approx(0.0, abs=1e-9)
        assert fidelity.ssim is not None
        assert np.abs(Result.of(first).difference(Result.of(second))).min() == 1.0


def test_what_is_no_picture_has_no_ssim_and_its_own_range() -> None:
    latents = torch.linspace(-3, 3, 64).view(1, 4, 4, 4)
    fidelity = Result.of(latents).fidelity(Result.of(latents + 0.6))
    assert fidelity.psnr == pytest.approx(20.0, abs=1e-4)
    assert fidelity.ssim is None
    audio = Result.of({"audio": torch.sin(torch.arange(100.0)).to(torch.bfloat16)})
    assert audio.arrays[0].dtype == np.float32
    assert audio.fidelity(audio) == Fidelity(None, None)


def test_a_video_is_judged_frame_by_frame() -> None:
    video = torch.rand(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    other = video.clone()
    other[0, 1] += 0.3
    fidelity = Result.of(video).fidelity(Result.of(other))
    assert fidelity.psnr == pytest.approx(-10 * math.log10(0.09 / 4), abs=1e-4)
    alone = Result.of(video[:, 1]).fidelity(Result.of(other[:, 1]))
    assert alone.ssim is not None
    assert fidelity.ssim == pytest.approx((3 + alone.ssim) / 4)


@pytest.mark.parametrize("returned", [None, [], "a picture", object()])
def test_what_has_no_numbers_is_refused(returned: object) -> None:
    with pytest.raises(TypeError, match="it has to return what quality is judged on"):
        Result.of(returned)


def test_a_prediction_is_less_by_its_optimism() -> None:
    found = around(44.0).less(10 * math.log10(2))
    assert found.quality.psnr == pytest.approx(44.0 - 3.0103)
    assert found.quality.ssim == pytest.approx(1 - 2 * (1 - 0.44))
    assert Played((Fidelity(None, 1.0),), 1.0).less(3.0).fidelities == (Fidelity(None, 1.0),)
    assert around(44.0).less(0.0).quality == pytest.approx(around(44.0).quality)


def test_pictures_that_are_not_clamped_are_pictures_in_every_layout() -> None:
    """A plan's picture may leave the range where the uncached one does not."""
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    beyond = picture.clone()
    beyond[0, 0, 0, 0], picture[0, 0, 0, 0] = 1.25, 1.0
    for one, other in ((picture, beyond), (beyond, picture)):
        assert Result.of(one).is_picture
        assert Result.of(one).fidelity(Result.of(other)).ssim == 1.0  # as it is shown
        difference = Result.of(one).difference(Result.of(other))
        assert np.abs(difference).max() == pytest.approx(0.25)
    last = Result.of(picture.movedim(1, -1)).fidelity(Result.of(beyond.movedim(1, -1) / 2))
    assert last == Result.of(picture).fidelity(Result.of(beyond / 2))
    # A result that is far off is still compared with a picture, as a picture.
    assert Result.of(picture).fidelity(Result.of(picture * 4 - 2)).ssim is not None
    symmetric = Result.of(picture * 2 - 1)
    assert (symmetric.is_picture, symmetric.peak) == (False, pytest.approx(2.0, abs=0.02))
