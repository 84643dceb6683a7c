"""Quality is taken in floating point, and equals what a hand computes."""

from __future__ import annotations

from math import log10

import numpy as np
import pytest

from omni_cache.quality import Fidelity, fidelity_to, quality_of

BLACK, WHITE = (np.full((8, 8, 3), value, dtype=np.uint8) for value in (0, 255))


def test_black_and_white_are_as_far_apart_as_can_be_in_uint8_too() -> None:
    # In uint8 0 - 255 wraps around to 1, and the PSNR would be 48 dB.
    assert (BLACK - WHITE == 1).all()
    for first, second in ((BLACK, WHITE), (WHITE, BLACK)):
        assert fidelity_to(first, second).psnr == pytest.approx(0.0, abs=1e-12)
        as_floats = [each.astype(np.float32) / 255 for each in (first, second)]
        assert fidelity_to(*as_floats) == fidelity_to(first, second)


@pytest.mark.parametrize(("off", "decibel"), [(0.1, 20.0), (0.01, 40.0), (0.5, 20 * log10(2))])
def test_psnr_of_a_constant_error_is_that_of_its_square(off: float, decibel: float) -> None:
    reference = np.full((16, 16, 3), 0.25, dtype=np.float64)
    assert fidelity_to(reference, reference + off).psnr == pytest.approx(decibel)


def test_psnr_of_one_step_of_uint8_is_exact_in_double_precision() -> None:
    found = fidelity_to(WHITE, WHITE - 1).psnr
    assert found == pytest.approx(20 * log10(255), rel=1e-12)


def test_psnr_counts_every_channel() -> None:
    reference = np.zeros((10, 10, 3), dtype=np.float32)
    picture = reference.copy()
    picture[0, :, 0] = 1.0  # 10 of 300 numbers are off by 1
    assert fidelity_to(reference, picture).psnr == pytest.approx(10 * log10(30))


def test_identical_pictures_have_no_finite_psnr() -> None:
    assert fidelity_to(WHITE, WHITE) == Fidelity(None, 1.0)


def test_ssim_of_two_constants_is_that_of_their_means() -> None:
    # Without variance the structure term is 1; what is left compares the means.
    first, second, c1 = 0.2, 0.6, 0.01**2
    expected = (2 * first * second + c1) / (first**2 + second**2 + c1)
    pictures = [np.full((16, 16, 3), value, dtype=np.float64) for value in (first, second)]
    assert fidelity_to(*pictures).ssim == pytest.approx(expected)


def test_a_video_is_judged_over_all_frames() -> None:
    still = np.full((2, 8, 8, 3), 0.5, dtype=np.float32)
    flash = still.copy()
    flash[1] += 0.2
    assert fidelity_to(still, flash).psnr == pytest.approx(10 * log10(2 / 0.04), abs=1e-4)
    frame = fidelity_to(still[1], flash[1])
    assert fidelity_to(still, flash).ssim == pytest.approx((1 + frame.ssim) / 2)


def test_the_summary_is_median_and_fifth_percentile() -> None:
    psnr = [30.0, 50.0, 20.0, 40.0, 35.0, 45.0]
    ssim = [each / 100 for each in psnr]
    found = quality_of([Fidelity(*pair) for pair in zip(psnr, ssim, strict=True)])
    assert found.median == Fidelity(37.5, 0.375)
    assert found.fifth.psnr == pytest.approx(22.5)  # a quarter of the way from 20 to 30
    assert found.fifth.psnr == pytest.approx(np.percentile(psnr, 5))
    assert found.fifth.ssim == pytest.approx(np.percentile(ssim, 5))


def test_identical_pictures_among_others_count_as_better_than_all() -> None:
    same, near = Fidelity(None, 1.0), Fidelity(30.0, 0.9)
    assert quality_of([same, same, near]).median.psnr is None
    assert quality_of([same, same, near]).fifth.psnr == 30.0
    assert quality_of([same]).fifth == same
