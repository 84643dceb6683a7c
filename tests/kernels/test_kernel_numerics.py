"""Every implementation of every kernel agrees with reference.py, which computes in float64.

Tolerances, relative: SUMS for what follows from sums in fp32, RESCALED for what a polynomial of
moderate slope makes of it, FP64 for what is fp64 throughout. What is copied agrees exactly.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_implementations import Implementation
from omni_cache.kernels import reference, rel_l1_workspace
from torch import Tensor
from torch.testing import assert_close

SUMS = 1e-5
RESCALED = 1e-4
FP64 = 1e-12

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COEFFICIENTS = [2.0, -1.0, 0.5, 1.0, 0.01]
MAX_ELEMENTS = 12_000  # several tiles for each of three programs

EVERY_ORDER = pytest.mark.parametrize(
    "order", [[0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0], [0, 2, 3, 1], [1, 3, 0, 2]]
)
EVERY_STEP = pytest.mark.parametrize("steps", [[1, 1, 1, 1], [1, 1, 1, 2], [2, 1, 2, 1]])


def laid_out(values: Tensor, order: list[int], steps: list[int]) -> Tensor:
    """Return `values` with dimensions stored in `order`, each `steps` apart, and NaN between."""
    stored = torch.full([values.shape[d] * steps[d] for d in order], math.nan, dtype=values.dtype)
    view = stored.permute([order.index(d) for d in range(values.ndim)])
    view = view[tuple(slice(None, None, step) for step in steps)]
    return view.copy_(values)


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device` in the layout it has; `Tensor.to` would close its gaps."""
    stored = tensor.as_strided([tensor.untyped_storage().nbytes() // tensor.itemsize], [1], 0)
    return stored.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@st.composite
def sequences(draw: st.DrawFn, length: int, min_dims: int = 0) -> list[Tensor]:
    """Draw tensors of one shape and dtype that change by a few percent, each with its layout."""
    sizes = st.sampled_from([2, 3, 4, 5, 1, 16, 33])
    shape = draw(st.lists(sizes, min_size=min_dims, max_size=5))
    assume(math.prod(shape) <= MAX_ELEMENTS)
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator)
    sequence = []
    for _ in range(length):
        values = values + 0.1 * torch.randn(shape, generator=generator)
        order = draw(st.permutations(range(len(shape))))
        steps = draw(st.lists(st.sampled_from([1, 1, 2]), min_size=len(shape), max_size=len(shape)))
        sequence.append(laid_out((values * scale).to(dtype), order, steps))
    return sequence


def decide(
    implementation: Implementation,
    current: Tensor,
    previous: Tensor,
    *,
    accumulated: float = 0.0,
    coefficients: tuple[float, ...] = (1.0, 0.0),
    threshold: float = math.inf,
) -> tuple[list[float], float]:
    """Call the gate once with a state of its own; return the verdict and the next accumulated."""
    device = implementation.device
    state = torch.tensor([accumulated], dtype=torch.float64, device=device)
    verdict = implementation.rel_l1_gate(
        placed(current, device),
        previous.to(device, copy=True),
        state,
        rel_l1_workspace(device),
        torch.tensor(coefficients, dtype=torch.float64, device=device),
        threshold,
    )
    return verdict.tolist(), state.item()


@settings(max_examples=25)
@given(sequence=sequences(length=5))
def test_rel_l1_gate_follows_the_reference_over_successive_steps(
    implementation: Implementation, sequence: list[Tensor]
) -> None:
    device, threshold = implementation.device, 0.25
    workspace = rel_l1_workspace(device)
    coefficients = torch.tensor(COEFFICIENTS, dtype=torch.float64)
    expected_previous = sequence[0].contiguous()
    expected_accumulated = torch.zeros(1, dtype=torch.float64)
    previous = expected_previous.clone().to(device)
    accumulated = expected_accumulated.clone().to(device)
    for current in sequence[1:]:
        expected, expected_previous, expected_accumulated = reference.rel_l1_gate(
            current, expected_previous, expected_accumulated, coefficients, threshold
        )
        assume(not math.isclose(expected[2], threshold, rel_tol=2 * RESCALED))
        verdict = implementation.rel_l1_gate(
            placed(current, device),
            previous,
            accumulated,
            workspace,
            coefficients.to(device),
            threshold,
        ).cpu()
        assert verdict[0] == expected[0]
        assert_close(verdict[1], expected[1], rtol=SUMS, atol=0.0, equal_nan=True)
        assert_close(verdict[2], expected[2], rtol=RESCALED, atol=0.0, equal_nan=True)
        assert_close(accumulated.cpu(), expected_accumulated, rtol=RESCALED, atol=0.0)
        assert torch.equal(previous.cpu(), expected_previous)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["current", "previous"])
def test_one_element_that_is_not_finite_computes_and_resets(
    implementation: Implementation, dtype: torch.dtype, poison: float, where: str
) -> None:
    tensors = {
        "current": torch.ones(3, 1711, dtype=dtype),
        "previous": torch.ones(3, 1711).to(dtype),
    }
    tensors[where][2, 1234] = poison
    (compute, *_), accumulated = decide(implementation, **tensors, accumulated=0.5)
    assert (compute, accumulated) == (1.0, 0.0)


@pytest.mark.parametrize("coefficients", [(math.nan,), (1.0, math.inf)])
def test_an_accumulated_distance_that_is_not_finite_computes_and_resets(
    implementation: Implementation, coefficients: tuple[float, ...]
) -> None:
    signal = torch.ones(8)
    (compute, *_), accumulated = decide(implementation, signal, signal, coefficients=coefficients)
    assert (compute, accumulated) == (1.0, 0.0)


def test_a_distance_that_is_not_finite_computes_even_if_the_polynomial_ignores_it(
    implementation: Implementation,
) -> None:
    poisoned = torch.full([8], math.nan)
    (compute, *_), _ = decide(implementation, poisoned, torch.ones(8), coefficients=(0.0,))
    assert compute == 1.0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 7), (2, 3, 0, 5, 1)])
def test_an_empty_signal_computes(implementation: Implementation, shape: tuple[int, ...]) -> None:
    (compute, *_), accumulated = decide(implementation, torch.ones(shape), torch.ones(shape))
    assert (compute, accumulated) == (1.0, 0.0)


def test_one_element_has_a_distance(implementation: Implementation) -> None:
    (compute, distance, _), _ = decide(implementation, torch.tensor(3.0), torch.tensor(2.0))
    assert compute == 0.0
    assert distance == pytest.approx(0.5, rel=1e-7)


def test_a_zero_previous_signal_is_far_from_anything_else(implementation: Implementation) -> None:
    (_, distance, _), _ = decide(implementation, torch.ones(9), torch.zeros(9))
    assert distance == pytest.approx(1e8)


def test_reuse_needs_an_accumulated_distance_strictly_below_the_threshold(
    implementation: Implementation,
) -> None:
    signal = torch.ones(5)
    below = decide(implementation, signal, signal, coefficients=(-0.25,), threshold=0.3)
    at = decide(
        implementation, signal, signal, coefficients=(-0.25,), threshold=0.5, accumulated=0.25
    )
    assert below == ([0.0, 0.0, 0.25], 0.25)
    assert at == ([1.0, 0.0, 0.5], 0.0)


def test_the_threshold_is_not_rounded_to_fp32(implementation: Implementation) -> None:
    signal, just_above = torch.ones(5), 0.25 + 1e-12
    (compute, *_), _ = decide(
        implementation, signal, signal, coefficients=(0.25,), threshold=just_above
    )
    assert compute == 0.0


@EVERY_ORDER
@EVERY_STEP
def test_a_signal_is_read_in_any_layout(
    implementation: Implementation, order: list[int], steps: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    current, previous = torch.randn(2, 5, 6, 7, 35, generator=generator)
    contiguous, _ = decide(implementation, current, previous)
    verdict, _ = decide(implementation, laid_out(current, order, steps), previous)
    assert verdict == pytest.approx(contiguous, rel=SUMS)


def test_a_signal_expanded_along_a_dimension_is_read_in_place(
    implementation: Implementation,
) -> None:
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(7, 1, 33, generator=generator).expand(7, 50, 33)
    previous = torch.randn(7, 50, 33, generator=generator)
    expected, _, _ = reference.rel_l1_gate(
        current,
        previous,
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        math.inf,
    )
    verdict, _ = decide(implementation, current, previous)
    assert verdict == pytest.approx(expected.tolist(), rel=SUMS)


def test_a_workspace_serves_signals_of_any_size_with_the_same_bits_each_time(
    implementation: Implementation,
) -> None:
    device = implementation.device
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, size, generator=generator) for size in (9_001, 1, 20_000, 64)]
    workspace = rel_l1_workspace(device)
    identity = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)

    def distances() -> list[float]:
        return [
            implementation.rel_l1_gate(
                pair[0].to(device),
                pair[1].to(device, copy=True),
                torch.zeros(1, dtype=torch.float64, device=device),
                workspace,
                identity,
                math.inf,
            )[1].item()
            for pair in pairs
        ]

    first = distances()
    assert distances() == first
    assert distances() == first


finite_or_not = st.one_of(
    st.floats(0.9, 1.1), st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, 1e300])
)


@settings(max_examples=25)
@given(
    ratios=st.lists(finite_or_not, max_size=12),
    threshold=st.sampled_from([0.0, 0.1, 0.24, math.inf]),
    max_skip_steps=st.integers(0, 6),
    shape=st.sampled_from([(), (1,)]),
)
def test_magnitude_gate_follows_the_reference_over_successive_steps(
    implementation: Implementation,
    ratios: list[float],
    threshold: float,
    max_skip_steps: int,
    shape: tuple[int, ...],
) -> None:
    expected_state = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    state = expected_state.clone().to(implementation.device)
    for value in ratios:
        ratio = torch.full(shape, value, dtype=torch.float64)
        expected, expected_state = reference.magnitude_gate(
            expected_state, ratio, threshold, max_skip_steps
        )
        verdict = implementation.magnitude_gate(
            state, ratio.to(implementation.device), threshold, max_skip_steps
        )
        assert_close(verdict.cpu(), expected, rtol=FP64, atol=0.0, equal_nan=True)
        assert_close(state.cpu(), expected_state, rtol=FP64, atol=0.0)


def test_magnitude_gate_still_reuses_at_an_error_equal_to_the_threshold(
    implementation: Implementation,
) -> None:
    state = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=implementation.device)
    ratio = torch.tensor([0.75], dtype=torch.float64, device=implementation.device)
    assert implementation.magnitude_gate(state, ratio, 0.25, 9).tolist() == [0.0, 0.75, 0.25]
    assert implementation.magnitude_gate(state, ratio, 0.25, 9).tolist() == [1.0, 0.5625, 0.6875]
    assert state.tolist() == [1.0, 0.0, 0.0]


def test_magnitude_gate_reuses_max_skip_steps_times_and_then_computes(
    implementation: Implementation,
) -> None:
    state = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=implementation.device)
    ratio = torch.ones((), dtype=torch.float64, device=implementation.device)
    computed = [implementation.magnitude_gate(state, ratio, 0.1, 3)[0].item() for _ in range(8)]
    assert computed == [0.0, 0.0, 0.0, 1.0] * 2


@settings(max_examples=25)
@given(pair=sequences(length=2, min_dims=1))
def test_magnitude_stats_follow_the_reference(
    implementation: Implementation, pair: list[Tensor]
) -> None:
    residual, previous = pair
    stats = implementation.magnitude_stats(
        placed(residual, implementation.device), placed(previous, implementation.device)
    )
    expected = reference.magnitude_stats(residual, previous)
    assert_close(stats.cpu(), expected, rtol=SUMS, atol=SUMS)


@EVERY_ORDER
@EVERY_STEP
def test_residuals_are_read_in_any_layout(
    implementation: Implementation, order: list[int], steps: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    residual, previous = torch.randn(2, 5, 6, 7, 35, generator=generator)
    stats = implementation.magnitude_stats(
        placed(laid_out(residual, order, steps), implementation.device),
        placed(laid_out(previous, order[::-1], steps), implementation.device),
    )
    assert_close(stats.cpu(), reference.magnitude_stats(residual, previous), rtol=SUMS, atol=SUMS)


@pytest.mark.parametrize(
    ("residual", "previous", "expected"),
    [
        pytest.param([[3.0, 4.0]], [[3.0, 4.0]], (1.0, 0.0, 0.0), id="one token, no change"),
        pytest.param([[0.0, 2.0]], [[1.0, 0.0]], (2.0, 0.0, 1.0), id="orthogonal"),
        pytest.param([[2.0], [4.0]], [[1.0], [-1.0]], (3.0, 2**0.5, 1.0), id="unbiased std"),
        pytest.param([[0.0]], [[5.0]], (0.0, 0.0, 1.0), id="zero residual"),
        pytest.param([[5.0], [2.0]], [[0.0], [1.0]], (2.0, 0.0, 0.0), id="zero previous left out"),
        pytest.param([[5.0], [0.0]], [[0.0], [0.0]], (1.0, 0.0, 0.0), id="none left"),
    ],
)
def test_magnitude_stats_of_few_tokens(
    implementation: Implementation,
    residual: list[list[float]],
    previous: list[list[float]],
    expected: tuple[float, float, float],
) -> None:
    device = implementation.device
    stats = implementation.magnitude_stats(
        torch.tensor(residual, device=device), torch.tensor(previous, device=device)
    )
    assert stats.tolist() == pytest.approx(expected, rel=SUMS, abs=1e-7)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3, 4)])
def test_magnitude_stats_of_nothing_are_those_of_no_change(
    implementation: Implementation, shape: tuple[int, ...]
) -> None:
    nothing = torch.ones(shape, device=implementation.device)
    assert implementation.magnitude_stats(nothing, nothing.clone()).tolist() == [1.0, 0.0, 0.0]


def test_magnitude_stats_keep_a_small_spread_around_a_large_ratio(
    implementation: Implementation,
) -> None:
    previous = torch.ones(5_000, 1)
    residual = torch.tensor([[4095.5], [4096.5]]).repeat(2_500, 1)
    stats = implementation.magnitude_stats(
        residual.to(implementation.device), previous.to(implementation.device)
    )
    assert stats[0].item() == pytest.approx(4096.0)
    assert stats[1].item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_magnitude_stats_do_not_hide_what_is_not_finite(
    implementation: Implementation, poison: float, where: int
) -> None:
    pair = torch.ones(2, 6, 700)
    pair[where, 3, 600] = poison
    residual, previous = pair.to(implementation.device)
    assert not implementation.magnitude_stats(residual, previous).isfinite().all()
