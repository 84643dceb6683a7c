"""A pipeline's scheduler tells the timesteps, so that its first generation is hoisted already."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_pipeline_generations import MAGCACHE, enabled
from tiny_pipelines import PIPELINES
from torch._dynamo.utils import counters

import omni_cache

# One for each branch: FLUX's pooled prompt enters, and Wan takes the dtype from its prompt. The
# branches of Stable Diffusion 3 are one batch, and Wan's experts are two models.
PASSES = {"flux": 2, "sd3": 1, "wan with experts": 4}


@pytest.mark.parametrize("name", PASSES)
def test_no_call_computes_modulations_for_itself(name: str) -> None:
    kind = PIPELINES[name]
    expected = kind.generate(enabled(kind, **MAGCACHE))
    torch._dynamo.reset()
    counters.clear()
    pipe = enabled(kind, **MAGCACHE, hoist="modulations")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="omni-cache: .*timestep")
        latents = kind.generate(pipe)
        found = omni_cache.summary(pipe).counters
        again = kind.generate(pipe)
    assert (found.tables, found.unlisted) == (PASSES[name], 0)
    assert omni_cache.summary(pipe).counters.tables == 2 * PASSES[name]
    assert omni_cache.summary(pipe).counters.recompiles == found.recompiles
    assert counters["graph_break"].total() == 0
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(again, latents)
