"""The eager reference agrees with the model where it must and differs where it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_models import REPRESENTATIVES, TEXT, ModelCase, sample
from eager_reference import block_loop_values, capture_residual, forced_reuse
from torch import Tensor, nn


@pytest.fixture(scope="module", params=list(REPRESENTATIVES.values()), ids=list(REPRESENTATIVES))
def case(request: pytest.FixtureRequest) -> ModelCase:
    chosen: ModelCase = request.param
    return chosen


@pytest.fixture(scope="module")
def model(case: ModelCase) -> nn.Module:
    return case.build().requires_grad_(False)


def relative_change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


def test_its_own_residual_reproduces_the_output(case: ModelCase, model: nn.Module) -> None:
    inputs = case.inputs(step=5, batch=2)
    reused = forced_reuse(model, case, inputs, capture_residual(model, case, inputs))
    torch.testing.assert_close(reused, sample(model(**inputs)), rtol=1e-4, atol=1e-5)


def test_another_residual_does_not(case: ModelCase, model: nn.Module) -> None:
    inputs = case.inputs(step=5)
    output = sample(model(**inputs))
    other = capture_residual(model, case, case.inputs(step=4))
    nothing = {name: torch.zeros_like(value) for name, value in other.items()}
    assert relative_change(forced_reuse(model, case, inputs, other), output) > 1e-3
    assert relative_change(forced_reuse(model, case, inputs, nothing), output) > 1e-2


def test_the_model_is_as_before(case: ModelCase, model: nn.Module) -> None:
    inputs = case.inputs()
    output = sample(model(**inputs))
    forced_reuse(model, case, inputs, capture_residual(model, case, case.inputs(step=9)))
    assert torch.equal(sample(model(**inputs)), output)


def test_entry_is_what_the_first_block_received(case: ModelCase, model: nn.Module) -> None:
    received: list[Tensor] = []

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams = [kwargs.get(name) for name in ("encoder_hidden_states", "hidden_states")]
        received.extend(value for value in (*args, *streams) if isinstance(value, Tensor))

    handle = case.blocks(model)[0].register_forward_pre_hook(record, with_kwargs=True)
    inputs = case.inputs()
    try:
        model(**inputs)
    finally:
        handle.remove()
    joined = torch.cat(received[-2:], dim=1) if case.name in {"flux2", "chroma"} else None
    for entry in block_loop_values(model, case, inputs).entry.values():
        candidates = received if joined is None else [joined]
        assert any(torch.equal(entry, value) for value in candidates)


@pytest.mark.parametrize("name", ["flux", "qwen_image", "hunyuan_video", "cogvideox"])
def test_a_text_residual_that_nothing_reads_does_not_matter(name: str) -> None:
    case = REPRESENTATIVES[name]
    model = case.build().requires_grad_(False)
    inputs = case.inputs(step=5)
    residual = capture_residual(model, case, inputs)
    reused = forced_reuse(model, case, inputs, residual)
    for stream, matters in {"encoder_hidden_states": False, "hidden_states": True}.items():
        changed = {**residual, stream: residual[stream] * 2}
        assert torch.equal(forced_reuse(model, case, inputs, changed), reused) != matters


def test_sd3_drops_its_text_inside_the_last_block() -> None:
    case = REPRESENTATIVES["sd3"]
    assert list(capture_residual(case.build(), case, case.inputs())) == ["hidden_states"]


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_agrees_with_the_formula_written_out(name: str) -> None:
    """Epilogue(entry + residual), spelled with the model's own modules."""
    case = REPRESENTATIVES[name]
    model: Any = case.build().requires_grad_(False)
    inputs = case.inputs(step=5)
    residual = capture_residual(model, case, case.inputs(step=4))["hidden_states"]
    times = [1000 * inputs["timestep"], 1000 * inputs["guidance"]]
    if name == "flux":
        embedding = model.time_text_embed(*times, inputs["pooled_projections"])
    else:
        embedding = model.time_guidance_embed(*times)
        residual = residual[:, TEXT:]
    exit = model.x_embedder(inputs["hidden_states"]) + residual
    expected = model.proj_out(model.norm_out(exit, embedding))
    reused = forced_reuse(model, case, inputs, capture_residual(model, case, case.inputs(step=4)))
    torch.testing.assert_close(reused, expected)
