"""The tiny models are fit to test with: they run, every part of them matters, and they compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cross_section import cross_section
from diffusers_models import CASES, NUM_STEPS, REPRESENTATIVES, ModelCase, sample
from torch import Tensor, nn
from torch.fx import GraphModule


@pytest.fixture(scope="module", params=list(REPRESENTATIVES.values()), ids=list(REPRESENTATIVES))
def case(request: pytest.FixtureRequest) -> ModelCase:
    chosen: ModelCase = request.param
    return chosen


@pytest.fixture(scope="module")
def model(case: ModelCase) -> nn.Module:
    return case.build()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def relative_change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


def time_of(case: ModelCase, step: int) -> float:
    timestep: Tensor = case.inputs(step)[case.timestep_argument]
    return float(timestep[0])


def test_output_is_finite_and_of_ordinary_size(case: ModelCase, model: nn.Module) -> None:
    for step in (0, NUM_STEPS - 1):
        output = sample(model(**case.inputs(step)))
        assert torch.isfinite(output).all()
        assert 0.1 < output.std() < 10


def test_same_seed_gives_the_same_model_and_inputs(case: ModelCase, model: nn.Module) -> None:
    output = sample(model(**case.inputs(step=3)))
    assert torch.equal(sample(case.build(seed=0)(**case.inputs(step=3))), output)
    assert relative_change(sample(case.build(seed=1)(**case.inputs(step=3))), output) > 0.1
    assert relative_change(sample(model(**case.inputs(step=3, seed=1))), output) > 0.1


def test_batches_run(case: ModelCase, model: nn.Module) -> None:
    one = sample(model(**case.inputs(batch=1)))
    two = sample(model(**case.inputs(batch=2)))
    assert two.shape == (2, *one.shape[1:])
    assert relative_change(two[0], two[1]) > 0.1


def test_time_runs_one_way_and_the_output_moves_slowly(case: ModelCase, model: nn.Module) -> None:
    times = [time_of(case, step) for step in range(NUM_STEPS)]
    assert times in (sorted(set(times)), sorted(set(times), reverse=True))
    first, second, last = (sample(model(**case.inputs(step))) for step in (0, 1, NUM_STEPS - 1))
    assert 0 < relative_change(second, first) < 0.5 * relative_change(last, first)


def test_timestep_alone_changes_the_output(case: ModelCase, model: nn.Module) -> None:
    inputs = case.inputs(step=0)
    later = case.inputs(step=NUM_STEPS // 2)[case.timestep_argument]
    output = sample(model(**inputs))
    assert (
        relative_change(sample(model(**{**inputs, case.timestep_argument: later})), output) > 0.01
    )


def test_each_block_list_has_two_blocks_and_every_block_changes_the_output(
    case: ModelCase, model: nn.Module
) -> None:
    assert all(len(list(model.get_submodule(name).children())) >= 2 for name in case.block_lists)
    inputs = case.inputs()
    output = sample(model(**inputs))
    for block in case.blocks(model):
        weights = {name: value.clone() for name, value in block.state_dict().items()}
        for parameter in block.parameters():
            parameter.mul_(1.5)
        changed = sample(model(**inputs))
        block.load_state_dict(weights)
        assert relative_change(changed, output) > 0.01
    assert torch.equal(sample(model(**inputs)), output)


def test_no_parameter_is_left_at_zero(model: nn.Module) -> None:
    assert not [name for name, value in model.named_parameters() if not value.any()]


NOT_IN_EXACTNESS = ("chroma", "cogvideox", "ltx_video", "sana")
"""Classes that test_exactness.py, which captures others as one graph, leaves out by default."""


@pytest.mark.parametrize("case", cross_section(REPRESENTATIVES, NOT_IN_EXACTNESS), indirect=True)
def test_compiles_to_one_graph_equal_to_eager(case: ModelCase, model: nn.Module) -> None:
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, example_inputs: list[Tensor]) -> GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    for step in range(3):
        assert torch.equal(
            sample(compiled(**case.inputs(step))), sample(model(**case.inputs(step)))
        )
    assert len(graphs) == 1
    torch._dynamo.reset()


LISTS_BLOCKS = ("any_flow_far", "glm_image", "hidream_image", "wan_animate_2", "wan_vace")
"""Cases whose configuration or inputs have something for each block."""


# The configuration lists it in one of the few, and the inputs in the other.
@pytest.mark.parametrize(
    "name", cross_section({name: name for name in LISTS_BLOCKS}, ("any_flow_far", "glm_image"))
)
def test_what_is_listed_for_each_block_is_there_for_sixteen(name: str) -> None:
    for case, blocks in ((CASES[name].deep, 8), (CASES[name].deeper, 16)):
        assert len(case.blocks(case.build())) == blocks
