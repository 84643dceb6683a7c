"""Compiled by Inductor, computed steps are the plain model's and reused steps the formula's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from cross_section import cross_section
from diffusers_models import CASES, REPRESENTATIVES, ModelCase, sample
from eager_reference import capture_residual, forced_reuse
from one_trace import cached
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule

import omni_cache

STEPS = (0, 7, 14, 21)


def relative_change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


CROSS_SECTION = ("flux", "pixart")
"""Two streams that become one, and a single stream with cross-attention; each takes long."""


@pytest.mark.slow
@pytest.mark.parametrize("case", cross_section(REPRESENTATIVES, CROSS_SECTION))
@torch.no_grad()
def test_inductor_computes_and_reuses_as_eager_does(case: ModelCase) -> None:
    model = case.build()
    # Every step is as far from the last as any other: every second one is reused.
    alternate = cached(
        inner="inductor", strict=True, cache="teacache", coefficients=(0.2,), rel_l1_thresh=0.3
    )
    compiled = torch.compile(model, backend=alternate, fullgraph=True)
    with omni_cache.generation(), omni_cache.branch("cond"):
        outputs = [sample(compiled(**case.inputs(step))) for step in STEPS]
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.computed for step in trajectory.steps] == [True, False, True, False]
    for index in (0, 2):
        plain = sample(model(**case.inputs(STEPS[index])))
        assert relative_change(outputs[index], plain) < 1e-4
    for index in (1, 3):
        before, now = (case.inputs(STEPS[each]) for each in (index - 1, index))
        expected = forced_reuse(model, case, now, capture_residual(model, case, before))
        assert relative_change(outputs[index], expected) < 1e-4
        assert relative_change(sample(model(**now)), expected) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["unrolled", "rolled"])
@torch.no_grad()
def test_the_weights_of_every_part_are_static_inputs(
    monkeypatch: pytest.MonkeyPatch, blocks: str
) -> None:
    """CUDA graphs copy every other input, at every step."""
    model = CASES["flux"].build()
    weights = {each.data_ptr() for each in chain(model.parameters(), model.buffers())}
    static_and_weights: list[tuple[set[int], set[int]]] = []

    def compile_lowered(
        lowered: GraphModule, inputs: list[Any], *, static_input_idxs: list[int], **rest: Any
    ) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found = {
                i
                for i, each in enumerate(args)
                if isinstance(each, Tensor) and each.data_ptr() in weights
            }
            static_and_weights.append((set(static_input_idxs), found))
            return lowered(*args)

        return make_boxed_func(run)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", compile_lowered)
    alternate: Any = {"cache": "teacache", "coefficients": (0.2,), "rel_l1_thresh": 0.3}
    omni_cache.enable(model, inner="inductor", blocks=blocks, strict=True, **alternate)
    # What AOTAutograd finds in its cache, it does not hand on.
    no_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with no_cache, omni_cache.generation(), omni_cache.branch("cond"):
        for step in STEPS[:2]:
            model(**CASES["flux"].inputs(step))
    assert len(static_and_weights) >= 5  # prologue, body, epilogue; prologue, reuse, epilogue
    assert all(static == found for static, found in static_and_weights)
    assert max(len(found) for _, found in static_and_weights) > 20
