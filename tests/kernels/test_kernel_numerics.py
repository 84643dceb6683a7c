"""Every implementation of every kernel agrees with reference.py, which computes in float64.

Tolerances, relative: SUMS for what follows from sums in fp32, RESCALED for what a polynomial of
moderate slope makes of it, FP64 for what is fp64 throughout. What is copied agrees exactly.
"""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_implementations import INTERPRETED, Implementation
from omni_cache.kernels import reference
from torch import Tensor
from torch.testing import assert_close

SUMS = 1e-5
RESCALED = 1e-4
FP64 = 1e-12

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COEFFICIENTS = [2.0, -1.0, 0.5, 1.0, 0.01]
MAX_ELEMENTS = 12_000  # several tiles for each of three programs
EXAMPLES = 8 if INTERPRETED else 25
"""The interpreter takes long for each; parametrised tests beside them hold the cases by name."""


def interpreted_seldom(value: object) -> object:
    """A parameter that the interpreter, which takes long, is given with --exhaustive only."""
    marks = pytest.mark.exhaustive if INTERPRETED else ()
    return pytest.param(value, marks=marks)


# In the order of memory, against it, and in neither; without gaps, and with gaps in two dimensions.
EVERY_ORDER = pytest.mark.parametrize(
    "order",
    [
        [0, 1, 2, 3],
        interpreted_seldom([1, 0, 2, 3]),
        [3, 2, 1, 0],
        interpreted_seldom([0, 2, 3, 1]),
        [1, 3, 0, 2],
    ],
)
EVERY_STEP = pytest.mark.parametrize(
    "steps", [[1, 1, 1, 1], interpreted_seldom([1, 1, 1, 2]), [2, 1, 2, 1]]
)


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
) -> list[float]:
    """Call the gate once; return the verdict."""
    device = implementation.device
    verdict = implementation.rel_l1_gate(
        placed(current, device),
        placed(previous, device),
        torch.tensor([accumulated], dtype=torch.float64, device=device),
        torch.tensor(coefficients, dtype=torch.float64, device=device),
        threshold,
    )
    numbers: list[float] = verdict.tolist()
    return numbers


@settings(max_examples=EXAMPLES)
@given(sequence=sequences(length=5))
def test_rel_l1_gate_follows_the_reference_over_successive_steps(
    implementation: Implementation, sequence: list[Tensor]
) -> None:
    device, threshold = implementation.device, 0.25
    coefficients = torch.tensor(COEFFICIENTS, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    accumulated, expected_accumulated = zero.to(device), zero
    for previous, current in itertools.pairwise(sequence):
        expected = reference.rel_l1_gate(
            current, previous, expected_accumulated, coefficients, threshold
        )
        assume(not math.isclose(expected[2], threshold, rel_tol=2 * RESCALED))
        verdict = implementation.rel_l1_gate(
            placed(current, device),
            placed(previous, device),
            accumulated,
            coefficients.to(device),
            threshold,
        )
        assert verdict[0].item() == expected[0]
        assert_close(verdict[1].cpu(), expected[1], rtol=SUMS, atol=0.0, equal_nan=True)
        assert_close(verdict[2].cpu(), expected[2], rtol=RESCALED, atol=0.0, equal_nan=True)
        reused = expected[0] == 0.0
        accumulated = verdict[2] if reused else zero.to(device)
        expected_accumulated = expected[2] if reused else zero


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["current", "previous"])
def test_one_element_that_is_not_finite_computes(
    implementation: Implementation, dtype: torch.dtype, poison: float, where: str
) -> None:
    tensors = {
        "current": torch.ones(3, 1711, dtype=dtype),
        "previous": torch.ones(3, 1711).to(dtype),
    }
    tensors[where][2, 1234] = poison
    compute, *_ = decide(implementation, **tensors, accumulated=0.5)
    assert compute == 1.0


@pytest.mark.parametrize("coefficients", [(math.nan,), (1.0, math.inf)])
def test_an_accumulated_distance_that_is_not_finite_computes(
    implementation: Implementation, coefficients: tuple[float, ...]
) -> None:
    signal = torch.ones(8)
    compute, *_ = decide(implementation, signal, signal, coefficients=coefficients)
    assert compute == 1.0


def test_a_distance_that_is_not_finite_computes_even_if_the_polynomial_ignores_it(
    implementation: Implementation,
) -> None:
    poisoned = torch.full([8], math.nan)
    compute, *_ = decide(implementation, poisoned, torch.ones(8), coefficients=(0.0,))
    assert compute == 1.0


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 7), (2, 3, 0, 5, 1)])
def test_an_empty_signal_computes(implementation: Implementation, shape: tuple[int, ...]) -> None:
    compute, *_ = decide(implementation, torch.ones(shape), torch.ones(shape))
    assert compute == 1.0


def test_one_element_has_a_distance(implementation: Implementation) -> None:
    compute, distance, _ = decide(implementation, torch.tensor(3.0), torch.tensor(2.0))
    assert compute == 0.0
    assert distance == pytest.approx(0.5, rel=1e-7)


def test_a_zero_previous_signal_is_far_from_anything_else(implementation: Implementation) -> None:
    _, distance, _ = decide(implementation, torch.ones(9), torch.zeros(9))
    assert distance == pytest.approx(1e8)


def test_reuse_needs_an_accumulated_distance_strictly_below_the_threshold(
    implementation: Implementation,
) -> None:
    signal = torch.ones(5)
    below = decide(implementation, signal, signal, coefficients=(-0.25,), threshold=0.3)
    at = decide(
        implementation, signal, signal, coefficients=(-0.25,), threshold=0.5, accumulated=0.25
    )
    assert below == [0.0, 0.0, 0.25]
    assert at == [1.0, 0.0, 0.5]


def test_the_threshold_is_not_rounded_to_fp32(implementation: Implementation) -> None:
    signal, just_above = torch.ones(5), 0.25 + 1e-12
    compute, *_ = decide(implementation, signal, signal, coefficients=(0.25,), threshold=just_above)
    assert compute == 0.0


@EVERY_ORDER
@EVERY_STEP
def test_a_signal_is_read_in_any_layout(
    implementation: Implementation, order: list[int], steps: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    current, previous = torch.randn(2, 5, 6, 7, 35, generator=generator)
    contiguous = decide(implementation, current, previous)
    strided = [laid_out(current, order, steps), laid_out(previous, order[::-1], steps)]
    assert decide(implementation, *strided) == pytest.approx(contiguous, rel=SUMS)


def test_a_scratch_serves_signals_of_any_size_with_the_same_bits_each_time(
    implementation: Implementation,
) -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, size, generator=generator) for size in (9_001, 1, 20_000, 64)]

    def numbers() -> list[list[float]]:
        device = implementation.device
        measured = [implementation.rel_l1(*pair.to(device), ()).tolist() for pair in pairs]
        printed = [implementation.fingerprint(pair.to(device)).tolist() for pair in pairs]
        return measured + printed + [decide(implementation, *pair) for pair in pairs]

    first = numbers()
    assert numbers() == first
    assert numbers() == first


@settings(max_examples=EXAMPLES)
@given(sequence=sequences(length=2))
def test_rel_l1_follows_the_reference(
    implementation: Implementation, sequence: list[Tensor]
) -> None:
    current, previous = sequence
    device = implementation.device
    numbers = implementation.rel_l1(placed(current, device), placed(previous, device), ())
    assert numbers.dtype == torch.float64
    assert_close(numbers.cpu(), reference.rel_l1(current, previous), rtol=SUMS, atol=0.0)


@EVERY_ORDER
@EVERY_STEP
def test_both_signals_are_read_in_any_layout(
    implementation: Implementation, order: list[int], steps: list[int]
) -> None:
    device = implementation.device
    generator = torch.Generator().manual_seed(0)
    current, previous = torch.randn(2, 5, 6, 7, 35, generator=generator)
    expected = reference.rel_l1(current, previous)
    for layouts in [(order, order), (order, order[::-1]), ([0, 1, 2, 3], order)]:
        pair = [laid_out(current, layouts[0], steps), laid_out(previous, layouts[1], steps)]
        numbers = implementation.rel_l1(*(placed(each, device) for each in pair), ())
        assert_close(numbers.cpu(), expected, rtol=SUMS, atol=0.0)


def test_signals_expanded_along_a_dimension_are_measured(implementation: Implementation) -> None:
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(7, 1, 33, generator=generator).expand(7, 50, 33)
    previous = torch.randn(7, 50, 1, generator=generator).expand(7, 50, 33)
    device = implementation.device
    numbers = implementation.rel_l1(placed(current, device), placed(previous, device), ())
    assert_close(numbers.cpu(), reference.rel_l1(current, previous), rtol=SUMS, atol=0.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_rel_l1_does_not_hide_what_is_not_finite(
    implementation: Implementation, poison: float, where: int
) -> None:
    pair = torch.ones(2, 3, 1711)
    pair[where, 2, 1234] = poison
    numbers = implementation.rel_l1(*pair.to(implementation.device), ())
    assert not numbers[0].isfinite()
    assert numbers[1].isfinite() == (where == 0)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0, 7), (2, 3, 0, 5, 1)])
def test_nothing_has_no_size_and_no_elements(
    implementation: Implementation, shape: tuple[int, ...]
) -> None:
    nothing = torch.ones(shape, device=implementation.device)
    assert implementation.rel_l1(nothing, nothing.clone(), ()).tolist() == [0.0, 0.0, 0.0]


RIDER_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


@pytest.mark.parametrize("dtype", RIDER_DTYPES, ids=str)
def test_what_rides_along_arrives_as_its_mean(
    implementation: Implementation, dtype: torch.dtype
) -> None:
    signal = torch.ones(4, 1000, device=implementation.device)
    whole = torch.arange(1, 121).reshape(2, 3, 20).to(dtype)
    riders = [whole, whole.mT, whole[1, 2, 9], whole[:1, :, ::3]]
    numbers = implementation.rel_l1(
        signal, signal, [placed(rider, implementation.device) for rider in riders]
    )
    expected = reference.rel_l1(signal.cpu(), signal.cpu(), riders)
    assert_close(numbers.cpu(), expected, rtol=FP64, atol=0.0)


@pytest.mark.parametrize(
    "rider",
    [
        pytest.param(torch.tensor(981.25).expand(2, 77), id="expanded over both dimensions"),
        pytest.param(torch.tensor([[1.0], [4.0]]).expand(2, 77), id="expanded over tokens"),
        pytest.param(torch.arange(1200.0), id="several blocks"),
        pytest.param(torch.arange(1200.0)[7::400], id="far apart"),
        pytest.param(torch.tensor(2**53 - 1), id="all bits of an integer"),
        pytest.param(torch.tensor(math.nan), id="NaN"),
        pytest.param(torch.zeros(0), id="empty"),
        pytest.param(torch.zeros(0, 1).expand(0, 5), id="empty and expanded"),
        pytest.param(torch.tensor([True, False, False, True]), id="flags"),
    ],
)
def test_a_rider_may_have_any_shape_and_strides(
    implementation: Implementation, rider: Tensor
) -> None:
    signal = torch.ones(3, device=implementation.device)
    numbers = implementation.rel_l1(signal, signal, [placed(rider, implementation.device)])
    expected = reference.rel_l1(signal.cpu(), signal.cpu(), [rider])
    assert_close(numbers.cpu(), expected, rtol=FP64, atol=0.0, equal_nan=True)


def test_a_rider_changes_no_bit_of_the_measurement(implementation: Implementation) -> None:
    pair = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    current, previous = pair.to(implementation.device)
    alone = implementation.rel_l1(current, previous, ()).tolist()
    for count in range(5):
        riders = [torch.tensor(float(i), device=current.device) for i in range(count)]
        numbers = implementation.rel_l1(current, previous, riders).tolist()
        assert numbers == alone + [float(i) for i in range(count)]


CONTENTS = [
    *RIDER_DTYPES,
    *(torch.float8_e4m3fn, torch.uint16, torch.complex32, torch.complex64, torch.complex128),
]


def with_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor of random bits, NaNs included."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(dtype)


def printed(implementation: Implementation, tensor: Tensor) -> tuple[float, ...]:
    """Return the fingerprint of a tensor of the CPU, in the layout it has."""
    numbers = implementation.fingerprint(placed(tensor, implementation.device))
    assert (numbers.shape, numbers.dtype) == ((2,), torch.float64)
    return tuple(numbers.tolist())


@pytest.mark.parametrize("dtype", CONTENTS, ids=str)
def test_equal_contents_have_equal_fingerprints_whatever_their_strides(
    implementation: Implementation, dtype: torch.dtype
) -> None:
    values = with_bits(dtype, 5, 6, 7, 36)
    expected = printed(implementation, values)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        for steps in ([1, 1, 1, 1], [2, 1, 2, 1]):
            stored = torch.zeros([values.shape[d] * steps[d] for d in order], dtype=dtype)
            view = stored.permute([order.index(d) for d in range(4)])
            view = view[tuple(slice(None, None, step) for step in steps)].copy_(values)
            assert printed(implementation, view) == expected
    off_by_one = torch.cat([values.reshape(-1)[:1], values.reshape(-1)])[1:].view(values.shape)
    assert printed(implementation, off_by_one) == expected


@pytest.mark.parametrize("dtype", CONTENTS, ids=str)
@pytest.mark.parametrize(
    "count", [1, 2, interpreted_seldom(3), interpreted_seldom(17), 1024, 1025, 9_001]
)
def test_a_fingerprint_tells_one_changed_element_and_is_made_of_two_small_integers(
    implementation: Implementation, dtype: torch.dtype, count: int
) -> None:
    values = with_bits(dtype, count)
    seen = {printed(implementation, values)}
    for place in {0, count // 2, count - 1}:
        changed = values.clone().view(torch.uint8)
        changed[(place + 1) * dtype.itemsize - 1] ^= 1
        seen.add(printed(implementation, changed.view(dtype)))
    assert len(seen) == 1 + len({0, count // 2, count - 1})
    assert all(0 <= n < 2**24 and n == int(n) for pair in seen for n in pair)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.bool], ids=str)
def test_a_fingerprint_tells_permutations_apart(
    implementation: Implementation, dtype: torch.dtype
) -> None:
    values = with_bits(dtype, 40, 90)
    arrangements = [values, values.flip(0), values.flip(1), values.roll(1, 0), values.roll(1, 1)]
    neighbours = values.clone()
    neighbours[3, 10:12] = ~values[3, 11] if dtype == torch.bool else values[3, 10:12].flip(0)
    arrangements += [neighbours, values.reshape(-1).flip(0).reshape(40, 90)]
    assert len({printed(implementation, each) for each in arrangements}) == len(arrangements)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_flipped_signs_do_not_cancel_in_a_fingerprint(
    implementation: Implementation, dtype: torch.dtype
) -> None:
    values = torch.ones(100, 64, dtype=dtype)
    seen = {printed(implementation, values), printed(implementation, -values)}
    pairs = [((0, i), (other, i + near)) for i in range(8) for other in (1, 90) for near in (0, 8)]
    for one, other in pairs:
        flipped = values.clone()
        flipped[one] *= -1
        flipped[other] *= -1
        seen.add(printed(implementation, flipped))
    assert len(seen) == 2 + len(pairs)


def test_fingerprints_of_many_small_changes_spread(implementation: Implementation) -> None:
    # That the interpreter computes the same fingerprints, the other tests say.
    count = 200 if INTERPRETED else 1_000
    seen = [printed(implementation, torch.full((3, 5), float(i))) for i in range(count)]
    assert len(set(seen)) == count
    for half in zip(*seen, strict=True):
        assert len(set(half)) > 0.99 * count
        assert sum(half) / count == pytest.approx(2**23, rel=0.1)


def test_a_fingerprint_is_of_the_contents_of_lazy_views(implementation: Implementation) -> None:
    values = with_bits(torch.complex64, 6, 9)
    conjugate = values.conj()
    assert printed(implementation, conjugate.resolve_conj()) == tuple(
        implementation.fingerprint(values.to(implementation.device).conj()).tolist()
    )
    assert printed(implementation, conjugate.imag.resolve_neg()) == tuple(
        implementation.fingerprint(values.to(implementation.device).conj().imag).tolist()
    )


def test_nothing_has_a_fingerprint(implementation: Implementation) -> None:
    assert printed(implementation, torch.zeros(0)) == printed(implementation, torch.zeros(3, 0))
    assert printed(implementation, torch.zeros(0)) != printed(implementation, torch.zeros(1))


finite_or_not = st.one_of(
    st.floats(0.9, 1.1), st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, 1e300])
)


@settings(max_examples=EXAMPLES)
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
    begin = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    state, expected_state = begin.to(implementation.device), begin
    for value in ratios:
        ratio = torch.full(shape, value, dtype=torch.float64)
        expected = reference.magnitude_gate(expected_state, ratio, threshold, max_skip_steps)
        verdict = implementation.magnitude_gate(
            state, ratio.to(implementation.device), threshold, max_skip_steps
        )
        assert_close(verdict.cpu(), expected, rtol=FP64, atol=0.0, equal_nan=True)
        reused = expected[0] == 0.0
        state = verdict[1:] if reused else begin.to(implementation.device)
        expected_state = expected[1:] if reused else begin


def test_magnitude_gate_still_reuses_at_an_error_equal_to_the_threshold(
    implementation: Implementation,
) -> None:
    state = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=implementation.device)
    ratio = torch.tensor([0.75], dtype=torch.float64, device=implementation.device)
    reused = implementation.magnitude_gate(state, ratio, 0.25, 9)
    assert reused.tolist() == [0.0, 0.75, 0.25, 1.0]
    computed = implementation.magnitude_gate(reused[1:], ratio, 0.25, 9)
    assert computed.tolist() == [1.0, 0.5625, 0.6875, 2.0]


def test_magnitude_gate_reuses_max_skip_steps_times_and_then_computes(
    implementation: Implementation,
) -> None:
    state = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=implementation.device)
    ratio = torch.ones((), dtype=torch.float64, device=implementation.device)
    computed = []
    for _ in range(4):
        compute, *_ = verdict = implementation.magnitude_gate(state, ratio, 0.1, 3)
        computed.append(compute.item())
        state = verdict[1:]
    assert computed == [0.0, 0.0, 0.0, 1.0]


@settings(max_examples=EXAMPLES)
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


@settings(max_examples=EXAMPLES)
@given(sequence=sequences(length=4), count=st.integers(0, 3), whole=st.booleans())
def test_inner_products_follow_the_reference_sample_by_sample(
    implementation: Implementation, sequence: list[Tensor], count: int, whole: bool
) -> None:
    residual, *previous = sequence[: 1 + count]
    samples = 1 if whole or residual.ndim == 0 else residual.shape[0]
    device = implementation.device
    products = implementation.inner_products(
        placed(residual, device), [placed(each, device) for each in previous], samples
    )
    expected = reference.inner_products(residual, previous, samples)
    assert (products.shape, products.dtype) == ((samples * (1 + count),), torch.float64)
    size = expected.abs().max().item()
    assert_close(products.cpu(), expected, rtol=FP64, atol=FP64 * size)


def test_inner_products_keep_the_digits_that_a_small_eigenvalue_needs(
    implementation: Implementation,
) -> None:
    """What is left of two nearly equal residuals, once their common part is taken out."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(3, 5_001, generator=generator, dtype=torch.float32) + 100
    other = one * (1 + 2.0**-10)  # exact in fp32 but for its last bits
    device = implementation.device
    (own, across) = implementation.inner_products(one.to(device), [other.to(device)], 1).tolist()
    (theirs,) = implementation.inner_products(other.to(device), [], 1).tolist()
    left = (own - 2 * across + theirs) / own
    exact = ((one.double() - other.double()) ** 2).sum() / (one.double() ** 2).sum()
    assert left == pytest.approx(exact.item(), rel=1e-7)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (0, 4, 5)])
def test_inner_products_of_nothing_are_zero(
    implementation: Implementation, shape: tuple[int, ...]
) -> None:
    nothing = torch.ones(shape, device=implementation.device)
    assert implementation.inner_products(nothing, [nothing], 1).tolist() == [0.0, 0.0]
    found = implementation.inner_products(nothing, [nothing], shape[0]).tolist()
    assert found == [0.0] * 2 * shape[0]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_inner_products_do_not_hide_what_is_not_finite(
    implementation: Implementation, poison: float
) -> None:
    pair = torch.ones(2, 6, 700, 1)
    pair[1, 3, 600] = poison
    residual, previous = pair.to(implementation.device)
    products = implementation.inner_products(residual, [previous], 6).view(6, 2)
    assert products.isfinite().tolist() == [[True, sample != 3] for sample in range(6)]
