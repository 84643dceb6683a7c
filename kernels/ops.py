"""The kernels as operators `omni_cache::...`: schema, checks, and an implementation per device.

CUDA and ROCm tensors go to Triton; any other device, or a machine without Triton, computes the same
in plain ATen. Triton is imported by the first call that needs it, because that takes as long as
half of `import torch`. No operator waits for the device, and none writes into its arguments.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NoReturn

import torch
from omni_cache.kernels.scratch import scratch_on
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of signals and residuals."""

RIDERS = (
    torch.bool,
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
"""The dtypes of what rides along with a measurement."""

MAX_RIDERS = 4

MAX_PREVIOUS = 15
"""Bound on the earlier residuals of one launch; the kernel is compiled for each number of them."""


def number_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of what is measured on `device`: float64, or float32 where it has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def rel_l1(current: Tensor, previous: Tensor, along: Sequence[Tensor] = ()) -> Tensor:
    """Measure how far two signals are apart, and bring a few small tensors along.

    One launch on a GPU. Sums are taken in fp32 by every program and in fp64 over programs. NaN and
    infinity pass through. The same inputs always give the same bits.

    Args:
        current: the signal of this step; any shape and strides, fp32, bf16 or fp16.
        previous: the signal it is compared with, of the same shape and dtype; any strides.
        along: at most MAX_RIDERS tensors, on the same device, of a dtype in RIDERS; any shape and
            strides, but small: one program reads them. They are for what the host wants to know in
            the same copy, such as a timestep or a flag.

    Returns:
        (3 + len(along),) of `number_dtype`: sum|current - previous|, sum|previous|, the number of
        elements (0 for an empty signal, whose sums are 0), and the mean of each tensor of `along`
        (NaN for an empty one).

    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    if current.is_cpu and type(current) is Tensor and not torch.compiler.is_compiling():
        # The way through the dispatcher into Python takes the host longer than the arithmetic.
        return _rel_l1_on_host(current, previous, along)
    numbers: Tensor = torch.ops.omni_cache.rel_l1.default(current, previous, along)
    return numbers


def sea_distance(
    current: Tensor,
    previous: Tensor,
    sigmas: Tensor,
    axes: Sequence[int],
    power: float,
    along: Sequence[Tensor] = (),
) -> Tensor:
    """Measure how far two latents are apart once noise is filtered out; formula: spectrum.py.

    One operator, of several launches: filter and distance. NaN and infinity pass through.

    Args:
        current: the latents of this step, (B, ...), fp32, bf16 or fp16, not empty.
        previous: those they are compared with, of the same shape and dtype.
        sigmas: (2,) of `number_dtype`, from 0 to 1: the noise in `current` and in `previous`.
        axes: which dimensions are filtered, those of space and time.
        power: exponent of the power that clean latents have at a frequency.
        along: as in `rel_l1`.

    Returns:
        (2 + len(along),) of `number_dtype`: the sum of the samples' distances, the number of
        samples, and the mean of each tensor of `along`.

    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    numbers: Tensor = torch.ops.omni_cache.sea_distance.default(
        current, previous, sigmas, axes, power, along
    )
    return numbers


def fingerprint(tensor: Tensor) -> Tensor:
    """Tell the contents of tensors apart, bit by bit, without reading them on the host.

    One launch on a GPU. Equal contents of equal shape and dtype give equal fingerprints whatever
    their strides; others, a permutation included, differ but for one case in 2**48. 0.0 and -0.0
    differ, and so do two NaNs of different bits. Comparable within one type of device.

    Args:
        tensor: any shape, strides and dtype, complex ones included.

    Returns:
        (2,) of `number_dtype`: integers from 0 to 2**24 - 1, exact in float32 too.

    Raises:
        ValueError: the tensor has no strides (it is sparse, say).
    """
    numbers: Tensor = torch.ops.omni_cache.fingerprint.default(tensor)
    return numbers


def rel_l1_gate(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    coefficients: Tensor,
    threshold: float,
) -> Tensor:
    """Decide on the device from the relative L1 distance of two signals; formula: distance.py.

    For a decision within a graph; on the host, a gate decides from what `rel_l1` measures. One
    launch on a GPU. Sums are taken in fp32, everything after them in `number_dtype`. An empty
    signal, a NaN or an infinity computes. The same inputs always give the same bits.

    Args:
        current: the signal of this step; any shape and strides, fp32, bf16 or fp16.
        previous: the signal of the last step, of the same shape and dtype; any strides.
        accumulated: 0-dim or (1,) of `number_dtype`, what has accumulated since the last computed
            step; 0 after one.
        coefficients: (k,) of `number_dtype`, k >= 1, contiguous, of the rescaling polynomial,
            highest power first.
        threshold: reuse while the accumulated distance is below it.

    Returns:
        (3,) of `number_dtype`: 1 for compute or 0 for reuse, the distance, and the accumulated
        distance with this step's, which is the next step's `accumulated` if this one is reused.

    Raises:
        ValueError: an argument has another shape, dtype, layout or device.
    """
    verdict: Tensor = torch.ops.omni_cache.rel_l1_gate.default(
        current, previous, accumulated, coefficients, threshold
    )
    return verdict


def magnitude_gate(state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int) -> Tensor:
    """Decide on the device from the accumulated magnitude ratio; formula: magnitude.py.

    For a decision within a graph. One launch of one program on a GPU. A NaN or an infinity
    computes.

    Args:
        state: (3,) of `number_dtype`, contiguous: accumulated ratio, accumulated error, skipped
            steps; (1, 0, 0) to begin with and after every computed step.
        ratio: 0-dim or (1,) of `number_dtype`, the magnitude ratio of this step.
        threshold: the most error that may accumulate.
        max_skip_steps: the most steps in a row that may be skipped.

    Returns:
        (4,) of `number_dtype`: 1 for compute or 0 for reuse, then accumulated ratio, accumulated
        error and skipped steps with this one, which are the next step's `state` if this one is
        reused.

    Raises:
        ValueError: an argument has another shape, dtype, layout or device.
    """
    verdict: Tensor = torch.ops.omni_cache.magnitude_gate.default(
        state, ratio, threshold, max_skip_steps
    )
    return verdict


def magnitude_stats(residual: Tensor, previous: Tensor) -> Tensor:
    """Compare two residuals token by token; what MagCache is calibrated with.

    Reads each tensor once. A token whose previous residual is zero has no ratio and is left out;
    if none remains, the result is that of no change, (1, 0, 0). A zero residual is orthogonal to
    any other: its cosine distance is 1. NaN and infinity pass through to the result.

    Args:
        residual: r_t of shape (..., D), D along the last dimension of each token; any strides,
            fp32, bf16 or fp16.
        previous: r_{t-1}, of the same shape and dtype; any strides.

    Returns:
        float32 (3,): mean and unbiased standard deviation (0 for one token) of the ratio
        ||r_t|| / ||r_{t-1}||, and mean cosine distance 1 - cos(r_t, r_{t-1}).

    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    stats: Tensor = torch.ops.omni_cache.magnitude_stats.default(residual, previous)
    return stats


def inner_products(residual: Tensor, previous: Sequence[Tensor], samples: int = 1) -> Tensor:
    """Take the inner products of a residual with itself and with earlier ones, for each sample.

    Products and sums are in fp64 (fp32 where the device has none): the eigenvalues of a matrix of
    inner products are squares, so that as many digits again are needed of them. Reads each tensor
    about once. NaN and infinity pass through. The same inputs always give the same bits.

    Args:
        residual: any shape and strides; fp32, bf16, fp16 or fp64, or complex, whose real and
            imaginary parts are numbers like others.
        previous: at most MAX_PREVIOUS earlier ones, of the same shape and dtype; any strides.
        samples: 1 for the whole tensor, or the size of the first dimension for its slices.

    Returns:
        (samples * (1 + len(previous)),) of `number_dtype`, sample by sample: the product with
        itself, and then with each of `previous`.

    Raises:
        ValueError: an argument has another shape, dtype or device.
    """
    if residual.is_complex():
        residual, previous = torch.view_as_real(residual), [*map(torch.view_as_real, previous)]
    products: Tensor = torch.ops.omni_cache.inner_products.default(residual, previous, samples)
    return products


def _check(
    argument: str,
    tensor: Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    shapes: Sequence[Sequence[int]] | None = None,
    contiguous: bool = False,
) -> None:
    if tensor.dtype not in dtypes:
        _reject(f"{argument}.dtype", tensor.dtype, dtypes)
    if shapes is not None and tensor.shape not in shapes:
        _reject(f"{argument}.shape", tuple(tensor.shape), map(tuple, shapes))
    if tensor.device != device:
        _reject(f"{argument}.device", tensor.device, [device])
    if contiguous and not tensor.is_contiguous():
        _reject(f"{argument}.stride()", tensor.stride(), ["contiguous"])


def _reject(argument: str, given: object, allowed: Iterable[object]) -> NoReturn:
    raise ValueError(f"{argument} is {given}; allowed: {' or '.join(map(str, allowed))}")


def _check_rel_l1(current: Tensor, previous: Tensor, along: Sequence[Tensor]) -> None:
    device = current.device
    _check("current", current, dtypes=FLOATS, device=device)
    _check("previous", previous, dtypes=[current.dtype], shapes=[current.shape], device=device)
    if len(along) > MAX_RIDERS:
        _reject("len(along)", len(along), [f"0 to {MAX_RIDERS}"])
    for i, rider in enumerate(along):
        _check(f"along[{i}]", rider, dtypes=RIDERS, device=device)


def _rel_l1_aten(current: Tensor, previous: Tensor, along: Sequence[Tensor]) -> Tensor:
    dtype = number_dtype(current.device)
    moved = (current.float() - previous).abs_().sum()
    size = previous.abs().sum(dtype=torch.float32)
    means = [rider if rider.numel() == 1 else rider.mean(dtype=dtype) for rider in along]
    if current.device.type == "cpu":  # where reading a number waits for nothing, and is fastest
        numbers = [moved.item(), size.item(), current.numel(), *(mean.item() for mean in means)]
        return torch.tensor(numbers, dtype=dtype)
    count = torch.full((), current.numel(), dtype=dtype, device=current.device)
    return _stacked([moved, size, count, *means], dtype)


def _stacked(numbers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([number.to(dtype).reshape(()) for number in numbers])


def _rel_l1_triton(current: Tensor, previous: Tensor, along: Sequence[Tensor]) -> Tensor:
    from omni_cache.kernels import distance, grid

    with torch.cuda.device(current.device):
        return distance.launch(
            current,
            previous,
            along,
            scratch=scratch_on(current.device),
            programs=grid.programs_on(current.device),
        )


def _check_sea_distance(
    current: Tensor,
    previous: Tensor,
    sigmas: Tensor,
    axes: Sequence[int],
    power: float,
    along: Sequence[Tensor],
) -> None:
    _check_rel_l1(current, previous, along)
    numbers = [number_dtype(current.device)]
    _check("sigmas", sigmas, dtypes=numbers, shapes=[(2,)], device=current.device)
    if not axes or not all(0 < axis < current.dim() for axis in axes):
        _reject("axes", list(axes), [f"one or more of 1 to {current.dim() - 1}"])
    if current.numel() == 0:
        _reject("current.shape", tuple(current.shape), ["one with elements"])


def _sea_distance_aten(
    current: Tensor,
    previous: Tensor,
    sigmas: Tensor,
    axes: Sequence[int],
    power: float,
    along: Sequence[Tensor],
) -> Tensor:
    from omni_cache.kernels import spectrum

    each = spectrum.distances(current, previous, sigmas, axes, power)
    means = [rider.mean(dtype=sigmas.dtype) for rider in along]
    count = torch.full((), each.numel(), dtype=sigmas.dtype, device=each.device)
    return _stacked([each.sum(), count, *means], sigmas.dtype)


def _check_fingerprint(tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        _reject("tensor.layout", tensor.layout, [torch.strided])


_ROW_BYTES = 8192
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


@cache
def _word_weights(device: torch.device) -> Tensor:
    """Return two random odd weights for each word of a row; by an odd one no bit is lost."""
    generator = torch.Generator().manual_seed(0)
    limit = 2**63 - 1
    weights = torch.randint(-limit, limit, (2, _ROW_BYTES // 8), generator=generator)
    return (weights | 1).to(device)


def _fingerprint_aten(tensor: Tensor) -> Tensor:
    """Scatter the words of each row by their place in it, add; then so with the rows' sums.

    Passes over memory are what takes time here, so the words are 64 bits of whatever lies one after
    the other, and they are mixed less thoroughly than in contents.py.
    """
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    data = real.resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() % _ROW_BYTES or data.storage_offset() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % _ROW_BYTES))
    weights = _word_weights(tensor.device)
    sums = _scattered(data.view(torch.int64).view(-1, _ROW_BYTES // 8), weights).sum(1)
    places = torch.arange(1, sums.numel() + 1, device=tensor.device)
    total = _scattered(torch.add(sums, places, alpha=_GOLDEN), weights[:, :1]).sum()
    halves = (total >> torch.arange(16, 64, 24, device=tensor.device)) & (2**24 - 1)
    return halves.to(number_dtype(tensor.device))


def _scattered(words: Tensor, weights: Tensor) -> Tensor:
    """Let every bit of a word reach its upper half, one to one and differently in each place.

    A product carries bits up only: flipped signs, the uppermost bits, would cancel in pairs. So one
    half is mixed into the other between two products. A shift would lose a bit for that, because
    that of int64 repeats the sign.
    """
    words = words * weights[0]
    halves = words.view(torch.int32).view(*words.shape, 2)
    halves[..., 0].bitwise_xor_(halves[..., 1])
    return words.mul_(weights[1])


def _fingerprint_triton(tensor: Tensor) -> Tensor:
    from omni_cache.kernels import contents, grid

    with torch.cuda.device(tensor.device):
        return contents.launch(
            tensor,
            scratch=scratch_on(tensor.device),
            programs=grid.programs_on(tensor.device),
        )


def _check_rel_l1_gate(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    coefficients: Tensor,
    threshold: float,
) -> None:
    _check_rel_l1(current, previous, ())
    device, numbers = current.device, [number_dtype(current.device)]
    _check("accumulated", accumulated, dtypes=numbers, shapes=[(), (1,)], device=device)
    _check("coefficients", coefficients, dtypes=numbers, device=device, contiguous=True)
    if coefficients.ndim != 1 or coefficients.numel() == 0:
        _reject("coefficients.shape", tuple(coefficients.shape), ["(k,) with k >= 1"])


def _rel_l1_gate_aten(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    coefficients: Tensor,
    threshold: float,
) -> Tensor:
    moved, size, count = _rel_l1_aten(current, previous, ()).unbind()
    distance = (moved / count) / (size / count + 1e-8)
    rescaled, *rest = coefficients.unbind()
    for coefficient in rest:
        rescaled = torch.addcmul(coefficient, rescaled, distance)
    total = accumulated.reshape(()) + rescaled.abs()
    # A comparison with NaN is false, so whatever is not finite computes.
    reuse = (distance < float("inf")) & (total < threshold)
    return _stacked([~reuse, distance, total], accumulated.dtype)


def _rel_l1_gate_triton(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    coefficients: Tensor,
    threshold: float,
) -> Tensor:
    from omni_cache.kernels import distance, grid

    with torch.cuda.device(current.device):
        return distance.launch_gate(
            current,
            previous,
            accumulated,
            coefficients,
            threshold,
            scratch=scratch_on(current.device),
            programs=grid.programs_on(current.device),
        )


def _check_magnitude_gate(
    state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int
) -> None:
    numbers = [number_dtype(state.device)]
    _check("state", state, dtypes=numbers, shapes=[(3,)], device=state.device, contiguous=True)
    _check("ratio", ratio, dtypes=numbers, shapes=[(), (1,)], device=state.device)


def _magnitude_gate_aten(
    state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int
) -> Tensor:
    accumulated = state[0] * ratio.reshape(())
    error = state[1] + (1.0 - accumulated).abs()
    skipped = state[2] + 1.0
    reuse = (error < float("inf")) & (error <= threshold) & (skipped <= max_skip_steps)
    return _stacked([~reuse, accumulated, error, skipped], state.dtype)


def _magnitude_gate_triton(
    state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int
) -> Tensor:
    from omni_cache.kernels import magnitude

    with torch.cuda.device(state.device):
        return magnitude.launch_gate(state, ratio, threshold, max_skip_steps)


def _check_magnitude_stats(residual: Tensor, previous: Tensor) -> None:
    device = residual.device
    _check("residual", residual, dtypes=FLOATS, device=device)
    if residual.ndim == 0:
        _reject("residual.shape", (), ["(..., D)"])
    _check("previous", previous, dtypes=[residual.dtype], shapes=[residual.shape], device=device)


def _magnitude_stats_aten(residual: Tensor, previous: Tensor) -> Tensor:
    r, p = residual.double(), previous.double()
    r_norm, p_norm = torch.linalg.vector_norm(r, dim=-1), torch.linalg.vector_norm(p, dim=-1)
    counted = p_norm != 0
    count = counted.sum()
    divisor = count.clamp(min=1)
    ratio = torch.where(counted, r_norm / torch.where(counted, p_norm, 1.0), 0.0)
    norms = r_norm * p_norm
    cosine = torch.linalg.vecdot(r, p) / torch.where(norms == 0, 1.0, norms)
    mean = torch.where(count == 0, 1.0, ratio.sum() / divisor)
    deviation = torch.where(counted, ratio - mean, 0.0)
    std = (deviation.square().sum() / (count - 1).clamp(min=1)).sqrt()
    distance = torch.where(counted, 1.0 - cosine, 0.0).sum() / divisor
    return torch.stack([mean, std, distance]).float()


def _magnitude_stats_triton(residual: Tensor, previous: Tensor) -> Tensor:
    from omni_cache.kernels import grid, magnitude

    with torch.cuda.device(residual.device):
        return magnitude.launch_stats(
            residual,
            previous,
            scratch=scratch_on(residual.device),
            programs=grid.programs_on(residual.device),
        )


def _check_inner_products(residual: Tensor, previous: Sequence[Tensor], samples: int) -> None:
    device, shape = residual.device, residual.shape
    _check("residual", residual, dtypes=(*FLOATS, torch.float64), device=device)
    if len(previous) > MAX_PREVIOUS:
        _reject("len(previous)", len(previous), [f"0 to {MAX_PREVIOUS}"])
    for i, each in enumerate(previous):
        _check(f"previous[{i}]", each, dtypes=[residual.dtype], shapes=[shape], device=device)
    if samples != 1 and samples not in shape[:1]:
        _reject("samples", samples, [1, *shape[:1]])


def _inner_products_aten(residual: Tensor, previous: Sequence[Tensor], samples: int) -> Tensor:
    dtype = number_dtype(residual.device)
    shape = samples, residual.numel() // max(samples, 1)
    rows = residual.to(dtype).reshape(shape)
    others = (each.to(dtype).reshape(shape) for each in previous)
    products = [torch.linalg.vecdot(rows, each) for each in (rows, *others)]
    return torch.stack(products, 1).reshape(-1)


def _inner_products_triton(residual: Tensor, previous: Sequence[Tensor], samples: int) -> Tensor:
    from omni_cache.kernels import grid, products

    with torch.cuda.device(residual.device):
        programs = grid.programs_on(residual.device)
        return products.launch(residual, previous, samples, programs=programs)


_LIBRARY: Any = torch.library.Library("omni_cache", "FRAGMENT")  # type: ignore[no-untyped-call]


def _register(
    schema: str,
    *,
    check: Callable[..., None],
    aten: Callable[..., Tensor],
    triton: Callable[..., Tensor] | None = None,
    shape: Callable[..., int] = lambda *_: 3,
    dtype: Callable[[torch.device], torch.dtype] = number_dtype,
) -> Callable[..., Tensor]:
    """Define an operator that checks its arguments first and returns a vector.

    It is made from a schema, not by `torch.library.custom_op`: the wrappers of the latter cost a
    call ten times as much as the dispatcher does. No gradient flows through a measurement.

    Args:
        triton: the kernel; None where ATen's serve on every device.
        shape: returns the length of the vector, from the arguments.
        dtype: returns the vector's dtype, from the device of the first argument.

    Returns:
        What it does where there is no kernel, as a function.
    """
    name = schema.partition("(")[0]

    def checked(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            check(*args)
            return implementation(*args)

        return call

    def without_gradient(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():  # entering no_grad again takes as long as an operation
            return aten(*args)
        with torch.no_grad():
            return aten(*args)

    def fake(*args: Any) -> Tensor:
        empty: Tensor = args[0].new_empty(shape(*args), dtype=dtype(args[0].device))
        return empty

    on_host = checked(without_gradient)
    _LIBRARY.define(f"{schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, on_host, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"omni_cache::{name}", checked(fake), lib=_LIBRARY)
    if triton is not None and importlib.util.find_spec("triton") is not None:
        _LIBRARY.impl(name, checked(triton), "CUDA")
    return on_host


_rel_l1_on_host = _register(
    "rel_l1(Tensor current, Tensor previous, Tensor[] along)",
    check=_check_rel_l1,
    aten=_rel_l1_aten,
    triton=_rel_l1_triton,
    shape=lambda current, previous, along: 3 + len(along),
)
_register(
    "sea_distance(Tensor current, Tensor previous, Tensor sigmas, int[] axes, float power, "
    "Tensor[] along)",
    check=_check_sea_distance,
    aten=_sea_distance_aten,
    shape=lambda current, previous, sigmas, axes, power, along: 2 + len(along),
)
_register(
    "fingerprint(Tensor tensor)",
    check=_check_fingerprint,
    aten=_fingerprint_aten,
    triton=_fingerprint_triton,
    shape=lambda tensor: 2,
)
_register(
    "rel_l1_gate(Tensor current, Tensor previous, Tensor accumulated, Tensor coefficients, "
    "float threshold)",
    check=_check_rel_l1_gate,
    aten=_rel_l1_gate_aten,
    triton=_rel_l1_gate_triton,
)
_register(
    "magnitude_gate(Tensor state, Tensor ratio, float threshold, int max_skip_steps)",
    check=_check_magnitude_gate,
    aten=_magnitude_gate_aten,
    triton=_magnitude_gate_triton,
    shape=lambda *_: 4,
)
_register(
    "magnitude_stats(Tensor residual, Tensor previous)",
    check=_check_magnitude_stats,
    aten=_magnitude_stats_aten,
    triton=_magnitude_stats_triton,
    dtype=lambda device: torch.float32,
)
_register(
    "inner_products(Tensor residual, Tensor[] previous, int samples)",
    check=_check_inner_products,
    aten=_inner_products_aten,
    triton=_inner_products_triton,
    shape=lambda residual, previous, samples: samples * (1 + len(previous)),
)
