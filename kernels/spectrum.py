"""How far two latents are apart once their noise is filtered out, as SeaCache measures it.

    g(f) = a S / (a^2 S + b^2 + e)     for each axis: S = 1 / (|f|^p + e), a = 1 - sigma, b = sigma
    G    = product of g over the axes, divided by its mean
    y    = Re iFFT(G FFT(x))           y' likewise, of the other latents at their own sigma
    d    = mean|y - y'| / (mean|y'| + e)                     for each sample

Chung et al., "SeaCache: Spectral-Evolution-Aware Cache for Accelerating Diffusion Models", CVPR
2026, https://arxiv.org/abs/2602.18993. Here e is 1e-16, as in the releases. A mean of absolute
values is no sum of squares, so that Parseval's identity is of no use, and spectra go back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPSILON = 1e-16


def distances(
    current: Tensor, previous: Tensor, sigmas: Tensor, axes: Sequence[int], power: float
) -> Tensor:
    """Return the distance of each sample, (B,) float32; arguments as in `ops`."""
    both = torch.stack((current, previous))
    # The releases compare in the dtype of the latents.
    now, before = filtered(both, sigmas, [axis + 1 for axis in axes], power).float().flatten(2)
    moved: Tensor = (now - before).abs().mean(1)
    size: Tensor = before.abs().mean(1)
    return moved / (size + _EPSILON)


def filtered(latents: Tensor, sigmas: Tensor, axes: Sequence[int], power: float) -> Tensor:
    """Return latents without their noise, in their own shape and dtype.

    Args:
        latents: (N, ...), each of N with a sigma of its own.
        sigmas: (N,), from 0 to 1.
        axes: which dimensions are filtered, those of space and time.
        power: exponent of the power that clean latents have at a frequency.
    """
    spectra = torch.fft.fftn(latents.float(), dim=list(axes)) * _gains(latents, sigmas, axes, power)
    kept: Tensor = torch.fft.ifftn(spectra, dim=list(axes)).real.to(latents.dtype)
    return kept


def _gains(latents: Tensor, sigmas: Tensor, axes: Sequence[int], power: float) -> Tensor:
    """Return the filter of each of them, of size 1 where it does not filter."""
    noise = sigmas.float().view(len(latents), *[1] * (latents.dim() - 1))
    signal = (1.0 - sigmas).float().view_as(noise)
    gains = torch.ones_like(noise)
    for axis in axes:
        size, device = latents.shape[axis], latents.device
        frequency = torch.fft.fftfreq(size, device=device, dtype=torch.float32)
        spectrum = 1.0 / (frequency.abs().pow(power) + _EPSILON)
        spectrum = spectrum.view(-1, *[1] * (latents.dim() - 1 - axis))
        gains = gains * (signal * spectrum / (signal**2 * spectrum + noise**2 + _EPSILON))
    return gains / gains.mean(list(range(1, latents.dim())), keepdim=True)
