"""The kernels as operators `omni_cache::...`: schema, checks, and an implementation per device.

CUDA and ROCm tensors go to Triton; any other device, or a machine without Triton, computes the same
in plain ATen. Triton is imported by the first call that needs it, because that takes as long as
half of `import torch`. No operator waits for the device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from omni_cache.kernels.workspace import REL_L1_WORKSPACE_SIZE
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of signals and residuals."""


def rel_l1_gate(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    workspace: Tensor,
    coefficients: Tensor,
    threshold: float,
) -> Tensor:
    """Decide from the relative L1 distance of two signals; TeaCache's gate (formula: rel_l1.py).

    One launch on a GPU. Sums are taken in fp32, everything after them in fp64. An empty signal, a
    NaN or an infinity computes. The same inputs always give the same bits.

    Args:
        current: the signal of this step; any shape and strides, fp32, bf16 or fp16.
        previous: the signal of the last step; contiguous, of the shape and dtype of `current`,
            which it is overwritten with.
        accumulated: float64 (1,), the distance accumulated since the last computed step; written.
        workspace: from `rel_l1_workspace`, on the same device; not to be shared by calls that may
            overlap.
        coefficients: float64 (k,), k >= 1, of the rescaling polynomial, highest power first.
        threshold: reuse while the accumulated distance is below it.

    Returns:
        float64 (3,): 1 for compute or 0 for reuse, the distance, and the accumulated distance
        before it is reset.

    Raises:
        ValueError: an argument has another shape, dtype, layout or device.
    """
    verdict: Tensor = torch.ops.omni_cache.rel_l1_gate.default(
        current, previous, accumulated, workspace, coefficients, threshold
    )
    return verdict


def magnitude_gate(state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int) -> Tensor:
    """Decide from the accumulated magnitude ratio; MagCache's gate (formula: magnitude.py).

    One launch of one program on a GPU, in fp64. A NaN or an infinity computes.

    Args:
        state: float64 (3,), contiguous: accumulated ratio, accumulated error, skipped steps;
            (1, 0, 0) to begin with and after every computed step; written.
        ratio: float64, 0-dim or (1,), the magnitude ratio of this step.
        threshold: the most error that may accumulate.
        max_skip_steps: the most steps in a row that may be skipped.

    Returns:
        float64 (3,): 1 for compute or 0 for reuse, accumulated ratio, and accumulated error, both
        before they are reset.

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


def _check_rel_l1_gate(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    workspace: Tensor,
    coefficients: Tensor,
    threshold: float,
) -> None:
    device = current.device
    _check("current", current, dtypes=FLOATS, device=device)
    _check(
        "previous",
        previous,
        dtypes=[current.dtype],
        shapes=[current.shape],
        device=device,
        contiguous=True,
    )
    _check("accumulated", accumulated, dtypes=[torch.float64], shapes=[(1,)], device=device)
    _check(
        "workspace",
        workspace,
        dtypes=[torch.float32],
        shapes=[(REL_L1_WORKSPACE_SIZE,)],
        device=device,
        contiguous=True,
    )
    _check("coefficients", coefficients, dtypes=[torch.float64], device=device, contiguous=True)
    if coefficients.ndim != 1 or coefficients.numel() == 0:
        _reject("coefficients.shape", tuple(coefficients.shape), ["(k,) with k >= 1"])


def _rel_l1_gate_aten(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    workspace: Tensor,
    coefficients: Tensor,
    threshold: float,
) -> Tensor:
    count = current.numel()
    mean_moved = (current.float() - previous).abs_().sum().double() / count
    mean_size = previous.abs().sum(dtype=torch.float32).double() / count
    distance = mean_moved / (mean_size + 1e-8)
    rescaled, *rest = coefficients.unbind()
    for coefficient in rest:
        rescaled = torch.addcmul(coefficient, rescaled, distance)
    total = accumulated + rescaled.abs()
    # A comparison with NaN is false, so whatever is not finite computes.
    reuse = (distance < float("inf")) & (total < threshold)
    previous.copy_(current)
    accumulated.copy_(torch.where(reuse, total, 0.0))
    return torch.cat([1.0 - reuse.double(), distance.reshape(1), total])


def _rel_l1_gate_triton(
    current: Tensor,
    previous: Tensor,
    accumulated: Tensor,
    workspace: Tensor,
    coefficients: Tensor,
    threshold: float,
) -> Tensor:
    from omni_cache.kernels import grid, rel_l1

    with torch.cuda.device(current.device):
        return rel_l1.launch(
            current,
            previous,
            accumulated,
            workspace,
            coefficients,
            threshold,
            programs=grid.programs_on(current.device),
        )


def _check_magnitude_gate(
    state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int
) -> None:
    fp64 = [torch.float64]
    _check("state", state, dtypes=fp64, shapes=[(3,)], device=state.device, contiguous=True)
    _check("ratio", ratio, dtypes=fp64, shapes=[(), (1,)], device=state.device)


def _magnitude_gate_aten(
    state: Tensor, ratio: Tensor, threshold: float, max_skip_steps: int
) -> Tensor:
    accumulated = state[0] * ratio.reshape(())
    error = state[1] + (1.0 - accumulated).abs()
    skipped = state[2] + 1.0
    reuse = (error < float("inf")) & (error <= threshold) & (skipped <= max_skip_steps)
    verdict = torch.stack([1.0 - reuse.double(), accumulated, error])
    begin = torch.tensor([1.0, 0.0, 0.0], dtype=state.dtype, device=state.device)
    state.copy_(torch.where(reuse, torch.stack([accumulated, error, skipped]), begin))
    return verdict


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
        programs = grid.programs_on(residual.device)
        return magnitude.launch_stats(residual, previous, programs=programs)


_LIBRARY: Any = torch.library.Library("omni_cache", "FRAGMENT")  # type: ignore[no-untyped-call]


def _register(
    name: str,
    arguments: str,
    *,
    check: Callable[..., None],
    aten: Callable[..., Tensor],
    triton: Callable[..., Tensor],
    result: torch.dtype,
) -> None:
    """Define an operator that checks its arguments first and returns three numbers of `result`.

    It is made from a schema, not by `torch.library.custom_op`: the wrappers of the latter cost a
    call ten times as much as the dispatcher does. No gradient flows through a decision.
    """

    def checked(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            check(*args)
            return implementation(*args)

        return call

    def fake(*args: Any) -> Tensor:
        empty: Tensor = args[0].new_empty(3, dtype=result)
        return empty

    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(f"{name}({arguments}) -> Tensor", tags=tags)
    _LIBRARY.impl(name, checked(torch.no_grad()(aten)), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"omni_cache::{name}", checked(fake), lib=_LIBRARY)
    if importlib.util.find_spec("triton") is not None:
        _LIBRARY.impl(name, checked(triton), "CUDA")


_register(
    "rel_l1_gate",
    "Tensor current, Tensor(a!) previous, Tensor(b!) accumulated, Tensor(c!) workspace, "
    "Tensor coefficients, float threshold",
    check=_check_rel_l1_gate,
    aten=_rel_l1_gate_aten,
    triton=_rel_l1_gate_triton,
    result=torch.float64,
)
_register(
    "magnitude_gate",
    "Tensor(a!) state, Tensor ratio, float threshold, int max_skip_steps",
    check=_check_magnitude_gate,
    aten=_magnitude_gate_aten,
    triton=_magnitude_gate_triton,
    result=torch.float64,
)
_register(
    "magnitude_stats",
    "Tensor residual, Tensor previous",
    check=_check_magnitude_stats,
    aten=_magnitude_stats_aten,
    triton=_magnitude_stats_triton,
    result=torch.float32,
)
