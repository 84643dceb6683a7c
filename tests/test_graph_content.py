"""What users put into a transformer and its calls leaves the cache exact, and apart.

computed steps   the model bit for bit
reused steps     what the eager model says with its blocks skipped (see eager_reference)
what changes     a mask, a precision, a size, an adapter between generations: never reuses what was
                 there before it. What a call does not show, in the middle of one, needs `refresh`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cross_section import also
from diffusers_models import CASES, TEXT, TEXT_CHANNELS, ModelCase, sample
from eager_reference import capture_residual, forced_reuse
from one_trace import OneTrace, cached
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from toy_transformer import WIDTH, Block, ToyTransformer, gaussian

import omni_cache
from omni_cache import UncachedWarning, explain
from omni_cache.capture.function import CapturedFunction

STEPS = (0, 7, 14)
ALWAYS: dict[str, Any] = {"cache": "teacache", "coefficients": (1.0, 0.0), "rel_l1_thresh": 1e6}
NEVER: dict[str, Any] = {**ALWAYS, "rel_l1_thresh": 0.0}

FLUX = replace(
    CASES["flux"], config={**CASES["flux"].config, "num_layers": 1, "num_single_layers": 2}
)
"""With as few blocks as still make two lists."""


Change = Callable[[dict[str, Any]], dict[str, Any]]
"""From the arguments of a call to those that a user would give instead."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def unchanged(given: dict[str, Any]) -> dict[str, Any]:
    return given


class Compiler:
    """An inner compiler that leaves graphs as they are, and counts how often it is asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return gm.forward


def enabled(model: nn.Module, **flags: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncachedWarning)
        return omni_cache.enable(model, **{"inner": "eager", **flags})  # type: ignore[no-any-return]


def loop(
    model: Callable[..., Any],
    case: ModelCase,
    change: Change = unchanged,
    seed: int = 0,
    batch: int = 1,
) -> list[Tensor]:
    """A short generation of one branch."""
    with omni_cache.generation(len(STEPS)), omni_cache.branch("cond"):
        given = (change(case.inputs(step, seed, batch)) for step in STEPS)
        return [sample(model(**each)) for each in given]


def steps(model: nn.Module) -> list[tuple[bool, str]]:
    """Of the latest generation's only branch: which steps were computed, and why."""
    (trajectory,) = omni_cache.summary(model).trajectories
    return [(each.computed, each.reason) for each in trajectory.steps]


def check(
    model: nn.Module,
    case: ModelCase,
    change: Change = unchanged,
    batch: int = 1,
    tolerance: float = 1e-5,
) -> None:
    """A model computes what it computes without us, and reuses what the eager formula says."""
    omni_cache.disable(model)
    plain = loop(model, case, change, batch=batch)
    given = [change(case.inputs(step, batch=batch)) for step in STEPS]
    residual = capture_residual(model, case, given[0])
    reused = [plain[0]] + [forced_reuse(model, case, each, residual) for each in given[1:]]

    trace = OneTrace(
        {"never": cached(**NEVER, strict=True), "always": cached(**ALWAYS, strict=True)}
    )
    compiled = CapturedFunction(model, backend=trace)
    assert all(map(torch.equal, loop(compiled, case, change, batch=batch), plain))
    assert [computed for computed, _ in steps(model)] == [True, True, True]
    trace.chosen = "always"
    omni_cache.refresh(model)
    got = loop(compiled, case, change, batch=batch)
    assert [computed for computed, _ in steps(model)] == [True, False, False]
    assert torch.equal(got[0], plain[0])
    for index in (1, 2):
        torch.testing.assert_close(got[index], reused[index], rtol=10 * tolerance, atol=tolerance)
        assert (got[index] - plain[index]).norm() > 1e-3 * plain[index].norm()


# --- LoRA ----------------------------------------------------------------------------------------


def lora(rank: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """A model whose adapters do something; they are made with a zero half."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def with_lora(seed: int = 1) -> nn.Module:
    model: Any = FLUX.build()
    model.add_adapter(lora(), "style")
    return randomised(model, seed)


def test_a_model_with_a_lora_adapter() -> None:
    model = with_lora()
    assert not torch.allclose(loop(model, FLUX)[0], loop(FLUX.build(), FLUX)[0], atol=1e-2)
    check(model, FLUX)


def test_the_scale_of_an_adapter_in_the_call() -> None:
    def half(given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "joint_attention_kwargs": {"scale": 0.5}}

    model = with_lora()
    assert not torch.allclose(loop(model, FLUX)[0], loop(model, FLUX, half)[0], atol=1e-3)
    check(model, FLUX, half)


def test_an_adapter_loaded_after_the_first_generation() -> None:
    model: Any = enabled(FLUX.build(), **ALWAYS)
    loop(model, FLUX)
    model.add_adapter(lora(), "style")
    randomised(model, 1)
    expected = loop(enabled(with_lora(), **ALWAYS), FLUX)
    assert all(map(torch.equal, loop(model, FLUX), expected))
    assert [computed for computed, _ in steps(model)] == [True, False, False]


def test_an_adapter_loaded_in_the_middle_is_no_basis_for_reuse() -> None:
    model: Any = enabled(FLUX.build(), **ALWAYS)
    with omni_cache.generation(4), omni_cache.branch("cond"):
        model(**FLUX.inputs(0))
        model.add_adapter(lora(), "style")
        randomised(model, 1)
        got = sample(model(**FLUX.inputs(7)))
        model(**FLUX.inputs(14))
        model.disable_adapters()
        bare = sample(model(**FLUX.inputs(21)))
    assert [computed for computed, _ in steps(model)] == [True, True, False, True]
    assert torch.equal(got, sample(with_lora()(**FLUX.inputs(7))))
    assert torch.equal(bare, sample(FLUX.build()(**FLUX.inputs(21))))


def hot_swapped(model: Any, seed: int, folder: Path) -> None:
    """Load another adapter's weights in the place of the first one's, as pipelines do."""
    from safetensors.torch import save_file

    other: Any = with_lora(seed)
    state = get_peft_model_state_dict(other, adapter_name="style")
    file = folder / f"{seed}.safetensors"
    save_file({f"transformer.{key}": value for key, value in state.items()}, file)
    model.load_lora_adapter(file, adapter_name="style", hotswap=True, local_files_only=True)


def test_a_hot_swapped_adapter_compiles_nothing_and_leaves_no_residual(tmp_path: Path) -> None:
    compiler = Compiler()
    model = omni_cache.enable(with_lora(1), inner=compiler, **ALWAYS)
    first = loop(model, FLUX)
    graphs = compiler.graphs
    hot_swapped(model, 2, tmp_path)
    second = loop(model, FLUX)
    assert compiler.graphs == graphs
    assert not torch.allclose(second[1], first[1], atol=1e-3)
    expected = loop(omni_cache.enable(with_lora(2), inner=compiler, **ALWAYS), FLUX)
    assert all(map(torch.equal, second, expected))
    check(model, FLUX)


def test_an_adapter_swapped_in_the_middle_is_told_of_by_refresh(tmp_path: Path) -> None:
    model = enabled(with_lora(1), **ALWAYS)
    with omni_cache.generation(3), omni_cache.branch("cond"):
        model(**FLUX.inputs(0))
        hot_swapped(model, 2, tmp_path)
        omni_cache.refresh(model)
        got = sample(model(**FLUX.inputs(7)))
    assert torch.equal(got, sample(with_lora(2)(**FLUX.inputs(7))))


# --- other ways to change the attention ----------------------------------------------------------


# Flux fuses those of its text too; the others hold one kind of projection each.
@pytest.mark.parametrize("name", ["flux", also("aura_flow"), also("pixart")])
def test_fused_projections(name: str) -> None:
    case = CASES[name]
    model: Any = case.build()
    apart = sample(model(**case.inputs()))
    model.fuse_qkv_projections()
    torch.testing.assert_close(sample(model(**case.inputs())), apart, rtol=1e-4, atol=1e-4)
    check(model, case)


def test_projections_fused_after_the_first_generation() -> None:
    model: Any = enabled(FLUX.build(), **ALWAYS)
    apart = loop(model, FLUX)
    model.fuse_qkv_projections()
    together = loop(model, FLUX)
    assert [computed for computed, _ in steps(model)] == [True, False, False]
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


IMAGE_CHANNELS = 12


def with_ip_adapter() -> nn.Module:
    model: Any = FLUX.build()
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    inner = model.inner_dim
    attention = {}
    for block in range(len(model.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            attention[f"{block}.{name}.weight"] = weight(inner, TEXT_CHANNELS)
            attention[f"{block}.{name}.bias"] = weight(inner)
    projection = {
        "proj.weight": weight(4 * TEXT_CHANNELS, IMAGE_CHANNELS),
        "proj.bias": weight(4 * TEXT_CHANNELS),
        "norm.weight": 1 + weight(TEXT_CHANNELS),
        "norm.bias": weight(TEXT_CHANNELS),
    }
    model._load_ip_adapter_weights(
        [{"image_proj": projection, "ip_adapter": attention}], low_cpu_mem_usage=False
    )
    return model  # type: ignore[no-any-return]


def shown(picture: str) -> Change:
    """Gives a call the embedding of a picture."""
    embedding = gaussian(picture, 1, 1, IMAGE_CHANNELS)

    def change(given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "joint_attention_kwargs": {"ip_adapter_image_embeds": [embedding]}}

    return change


def test_an_ip_adapter() -> None:
    model = with_ip_adapter()
    first, second = (loop(model, FLUX, shown(each))[0] for each in ("a fox", "a hare"))
    assert not torch.allclose(first, second, atol=1e-3)
    check(model, FLUX, shown("a fox"))


def test_another_picture_is_another_generation() -> None:
    """Also where only the timestep tells, which the abandoned loop has left behind."""
    model = enabled(with_ip_adapter(), **ALWAYS)
    fox, hare = shown("a fox"), shown("a hare")
    conditioning = FLUX.inputs()

    def call(change: Change, step: int) -> Tensor:
        # The pipeline keeps all but the latents for all steps.
        own = {key: FLUX.inputs(step)[key] for key in ("hidden_states", "timestep")}
        return sample(model(**change({**conditioning, **own})))

    for step in (0, 7, 14):
        call(fox, step)
    got = call(hare, 21)
    assert torch.equal(got, sample(omni_cache.disable(model)(**hare(FLUX.inputs(21)))))


# --- control ------------------------------------------------------------------------------------


SINGLE = "controlnet_single_block_samples"


def controlled(given: dict[str, Any]) -> dict[str, Any]:
    """With what a ControlNet adds behind each block, which moves with the steps as latents do."""
    states = given["hidden_states"]
    wide = torch.cat([states] * 4, -1)
    return {
        **given,
        "controlnet_block_samples": [0.5 * wide.cos()],
        SINGLE: [0.5 * wide.sin()],
    }


def test_the_residuals_of_a_controlnet() -> None:
    model = FLUX.build()
    plain, steered = loop(model, FLUX), loop(model, FLUX, controlled)
    assert not torch.allclose(plain[0], steered[0], atol=1e-2)
    enabled(model, **NEVER)
    assert all(map(torch.equal, loop(model, FLUX, controlled), steered))
    (graph,) = explain(model, **controlled(FLUX.inputs())).graphs
    assert graph.analysis is not None
    assert {"hidden_states"} == {_name(each.partner) for each in graph.analysis.pairs}

    # What a ControlNet adds lies within the region, so a reused step reuses it.
    enabled(model, **ALWAYS)
    got = loop(model, FLUX, controlled)
    assert [computed for computed, _ in steps(model)] == [True, False, False]
    embedded = [model.x_embedder(FLUX.inputs(step)["hidden_states"]) for step in STEPS]
    left: list[Tensor] = []
    conditioning: list[Tensor] = []
    omni_cache.disable(model)
    model.norm_out.register_forward_pre_hook(lambda _, args: left.append(args[0]))
    model.norm_out.register_forward_pre_hook(lambda _, args: conditioning.append(args[1]))
    model(**controlled(FLUX.inputs(STEPS[0])))
    for index in (1, 2):
        conditioning.clear()
        model(**FLUX.inputs(STEPS[index]))
        # That of the last block lies behind the region, and is this step's.
        last = [controlled(FLUX.inputs(STEPS[each]))[SINGLE][0] for each in (0, index)]
        state = embedded[index] + (left[0] - last[0] - embedded[0]) + last[1]
        expected = model.proj_out(model.norm_out(state, conditioning[0]))
        torch.testing.assert_close(got[index], expected, rtol=1e-4, atol=1e-5)


def _name(view: Any) -> str:
    return "hidden_states" if "hidden_states" in view.node.name else str(view)


def test_a_control_that_ends_in_the_middle_is_no_basis_for_reuse() -> None:
    """`control_guidance_end` of the pipelines."""
    model = enabled(FLUX.build(), **ALWAYS)
    with omni_cache.generation(4), omni_cache.branch("cond"):
        for step in (0, 7):
            model(**controlled(FLUX.inputs(step)))
        got = sample(model(**FLUX.inputs(14)))
        model(**FLUX.inputs(21))
    assert [computed for computed, _ in steps(model)] == [True, False, True, False]
    assert torch.equal(got, sample(FLUX.build()(**FLUX.inputs(14))))


# --- how it is called ----------------------------------------------------------------------------


def test_masks_of_changing_length() -> None:
    """Branches whose prompts differ in length, in turn, and a prompt that grows in the middle."""
    case = CASES["qwen_image"]
    model = case.build()

    def worded(step: int, words: int) -> dict[str, Any]:
        given = case.inputs(step)
        mask = torch.ones(1, words)
        mask[:, -1] = 0
        return {
            **given,
            "encoder_hidden_states": gaussian(words, 1, words, TEXT_CHANNELS),
            "encoder_hidden_states_mask": mask.to(given["encoder_hidden_states_mask"].dtype),
        }

    lengths = {"cond": (TEXT, TEXT, TEXT + 4, TEXT + 4), "uncond": (3, 3, 3, 3)}
    plain = {
        name: [
            sample(model(**worded(step, n))) for step, n in zip((0, 7, 14, 21), each, strict=True)
        ]
        for name, each in lengths.items()
    }
    enabled(model, **ALWAYS)
    got: dict[str, list[Tensor]] = {name: [] for name in lengths}
    with omni_cache.generation(4):
        for index, step in enumerate((0, 7, 14, 21)):
            for name, each in lengths.items():
                with omni_cache.branch(name):
                    got[name].append(sample(model(**worded(step, each[index]))))
    decided = {
        each.branch: [step.computed for step in each.steps]
        for each in omni_cache.summary(model).trajectories
    }
    assert decided == {"cond": [True, False, True, False], "uncond": [True, False, False, False]}
    for name, computed in decided.items():
        for index, is_computed in enumerate(computed):
            assert torch.equal(got[name][index], plain[name][index]) == is_computed


def test_return_dict_either_way_in_one_generation() -> None:
    model = enabled(FLUX.build(), **ALWAYS)
    plain = loop(FLUX.build(), FLUX)
    with omni_cache.generation(3), omni_cache.branch("cond"):
        first = model(**FLUX.inputs(0))
        second = model(**{**FLUX.inputs(7), "return_dict": True})
        third = model(**FLUX.inputs(14))
    assert [type(each).__name__ for each in (first, second, third)] == [
        "tuple",
        "Transformer2DModelOutput",
        "tuple",
    ]
    assert torch.equal(first[0], plain[0])
    # The graph is the same, and so is what it has cached.
    assert [computed for computed, _ in steps(model)] == [True, False, False]


def positionally(model: nn.Module, given: dict[str, Any], count: int) -> Tensor:
    """Call a model with its first arguments by position."""
    names = list(inspect_parameters(model))[:count]
    rest = {key: value for key, value in given.items() if key not in names}
    return sample(model(*(given.get(name) for name in names), **rest))


def inspect_parameters(model: nn.Module) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(model.forward).parameters)


# With four, the timestep is one of them and others follow by name.
@pytest.mark.parametrize("count", [also(1), 4, also(7)])
def test_arguments_by_position(count: int) -> None:
    """Without contexts, so that the timestep has to be found among them."""
    plain = loop(FLUX.build(), FLUX)
    model = enabled(FLUX.build(), **ALWAYS)
    kept = FLUX.inputs()
    got = []
    for step in STEPS:
        own = {key: FLUX.inputs(step)[key] for key in ("hidden_states", "timestep")}
        got.append(positionally(model, {**kept, **own}, count))
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [each.computed for each in trajectory.steps] == [True, False, False]
    assert [each.timestep for each in trajectory.steps] == pytest.approx([1.0, 0.75, 0.5])
    assert torch.equal(got[0], plain[0])
    assert not torch.allclose(got[1], plain[1], atol=1e-3)


# --- batches -------------------------------------------------------------------------------------


# The batch is the first axis of every stream in all of them.
@pytest.mark.parametrize("name", [also("flux"), also("wan"), "pixart"])
def test_a_batch_of_three(name: str) -> None:
    check(CASES[name].build(), CASES[name], batch=3)


def test_guidance_in_one_batch_is_one_trajectory_that_reuses_for_both() -> None:
    model = FLUX.build()

    def joined(step: int) -> dict[str, Any]:
        one, other = FLUX.inputs(step, seed=1), FLUX.inputs(step, seed=2)
        both = ("guidance", "timestep", "hidden_states", "encoder_hidden_states")
        return {
            key: torch.cat([value, other[key]]) if key in (*both, "pooled_projections") else value
            for key, value in one.items()
        }

    enabled(model, **ALWAYS)
    with omni_cache.generation(3), omni_cache.branch("both"):
        together = [sample(model(**joined(step))) for step in STEPS]
    assert [computed for computed, _ in steps(model)] == [True, False, False]
    for row, seed in enumerate((1, 2)):
        alone = loop(model, FLUX, seed=seed)
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[row : row + 1], other, rtol=1e-4, atol=1e-5)


def test_another_batch_size_in_the_middle_computes() -> None:
    model = enabled(FLUX.build(), **ALWAYS)
    with omni_cache.generation(4), omni_cache.branch("cond"):
        for step, batch in ((0, 1), (7, 2), (14, 2), (21, 1)):
            got = sample(model(**FLUX.inputs(step, batch=batch)))
    assert [computed for computed, _ in steps(model)] == [True, True, False, True]
    assert torch.equal(got, sample(FLUX.build()(**FLUX.inputs(21))))


# --- precision -----------------------------------------------------------------------------------


def halved(given: dict[str, Any]) -> dict[str, Any]:
    """Everything but positions and times in bfloat16, as pipelines pass it."""
    kept = ("timestep", "txt_ids", "img_ids")
    return {
        key: value.bfloat16()
        if isinstance(value, Tensor) and value.is_floating_point() and key not in kept
        else value
        for key, value in given.items()
    }


# Flux makes its rotary tables in float32, so that it has both precisions.
@pytest.mark.parametrize("name", ["flux", also("sd3")])
def test_a_model_in_bfloat16(name: str) -> None:
    check(CASES[name].build().bfloat16(), CASES[name], halved, tolerance=0.02)


def test_autocast_around_the_call() -> None:
    model = FLUX.build()
    with torch.autocast("cpu", torch.bfloat16):
        check(model, FLUX, tolerance=0.02)


def test_autocast_that_begins_in_the_middle_is_no_basis_for_reuse() -> None:
    model = enabled(FLUX.build(), **ALWAYS)
    with omni_cache.generation(4), omni_cache.branch("cond"):
        model(**FLUX.inputs(0))
        with torch.autocast("cpu", torch.bfloat16):
            got = sample(model(**FLUX.inputs(7)))
            model(**FLUX.inputs(14))
        model(**FLUX.inputs(21))
    assert [computed for computed, _ in steps(model)] == [True, True, False, True]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(got, sample(FLUX.build()(**FLUX.inputs(7))))


class CastingBlock(Block):
    def forward(self, x: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        y = x.to(self.out.weight.dtype)
        return x + (super().forward(y, time, mask) - y).to(x.dtype)


class Casting(ToyTransformer):
    """Blocks in bfloat16 on a stream that is kept in float32 between them, and the reverse."""

    def __init__(self, stream: torch.dtype, inside: torch.dtype) -> None:
        super().__init__()
        self.stream, self.inside = stream, inside
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(CastingBlock() for _ in range(4)).to(inside)
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        time = x.mean(1) + self.embed_time(timestep[:, None] / 500)
        x = x.to(self.stream)
        for block in self.blocks:
            x = block(x, time.to(self.inside), None)
        return self.project(x.float())


@pytest.mark.parametrize(
    ("stream", "inside"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["wide stream", "narrow stream"],
)
def test_casts_between_blocks(stream: torch.dtype, inside: torch.dtype) -> None:
    model = Casting(stream, inside)
    given = [(gaussian(step, 1, 6, 4), torch.tensor([900.0 - 300 * step])) for step in range(3)]
    plain = [model(*each) for each in given]
    (graph,) = explain(model, *given[0], cache_options=ALWAYS).graphs
    assert graph.analysis is not None
    (pair,) = graph.analysis.pairs
    assert not pair.held
    assert pair.output.meta["example_value"].dtype == stream

    enabled(model, **NEVER)
    assert all(torch.equal(model(*each), want) for each, want in zip(given, plain, strict=True))
    enabled(model, **ALWAYS)
    with omni_cache.generation(3), omni_cache.branch("cond"):
        got = [model(*each) for each in given]
    entry = [model.embed(each[0]).to(stream) for each in given]
    left: list[Tensor] = []
    handle = model.project.register_forward_pre_hook(lambda _, args: left.append(args[0]))
    omni_cache.disable(model)(*given[0])
    handle.remove()
    residual = left[0].to(stream) - entry[0]
    for index in (1, 2):
        expected = model.project((entry[index] + residual).float())
        torch.testing.assert_close(got[index], expected, rtol=1e-3, atol=1e-3)


# Flux, quantised below, runs eagerly.
@pytest.mark.parametrize("inner", [also("eager"), "inductor"])
def test_weights_of_eight_bits(inner: str) -> None:
    """The int8 weight-only quantisation of torchao keeps weights in a subclass of Tensor."""
    model = ToyTransformer(blocks=4)
    plain = model(*(given := (gaussian(0, 1, 6, 4), torch.tensor([900.0]))))
    quantize_(model.blocks, Int8WeightOnlyConfig())
    assert type(model.blocks[0].qkv.weight) is not nn.Parameter
    quantised = model(*given)
    torch.testing.assert_close(quantised, plain, rtol=0.1, atol=0.1)
    assert not torch.equal(quantised, plain)

    inputs = [(gaussian(step, 1, 6, 4), torch.tensor([900.0 - 300 * step])) for step in range(3)]
    expected = [model(*each) for each in inputs]
    omni_cache.enable(model, inner=inner, **NEVER)
    for each, want in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(*each), want, rtol=1e-4, atol=1e-5)
    omni_cache.enable(model, inner=inner, **ALWAYS)
    with omni_cache.generation(3), omni_cache.branch("cond"):
        got = [model(*each) for each in inputs]
    assert [computed for computed, _ in steps(model)] == [True, False, False]
    moved = [model.embed(each[0]) - model.embed(inputs[0][0]) for each in inputs]
    for index in (1, 2):
        reused = expected[0] + F.linear(moved[index], model.project.weight)
        torch.testing.assert_close(got[index], reused, rtol=1e-3, atol=1e-4)


def test_a_quantised_flux() -> None:
    model = FLUX.build()
    quantize_(model, Int8WeightOnlyConfig())
    check(model, FLUX)


# --- sizes ---------------------------------------------------------------------------------------


def resized(step: int, height: int, width: int) -> dict[str, Any]:
    given = FLUX.inputs(step)
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
    noise = gaussian(f"{step} {height}", 1, height * width, 8)
    return {**given, "hidden_states": noise, "img_ids": grid.float()}


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_a_second_resolution_compiles_once_more_at_most_and_shares_no_state(
    dynamic: bool | None,
) -> None:
    sizes = ((4, 6), (6, 8), (8, 10), (4, 6))
    plain = [sample(FLUX.build()(**resized(0, *size))) for size in sizes]
    compiler = Compiler()
    model = omni_cache.enable(FLUX.build(), inner=compiler, dynamic=dynamic, **ALWAYS)
    compilations = []
    with omni_cache.generation(8), omni_cache.branch("cond"):
        for index, size in enumerate(sizes):
            first = sample(model(**resized(0, *size)))
            torch.testing.assert_close(first, plain[index], rtol=1e-5, atol=1e-6)
            model(**resized(7, *size))
            compilations.append(compiler.graphs // 4)
    assert [computed for computed, _ in steps(model)] == [True, False] * 4
    assert compilations == ([1, 1, 1, 1] if dynamic else [1, 2, 2, 2])


# --- memory --------------------------------------------------------------------------------------


class InPlaceBlock(Block):
    def forward(self, x: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        x += super().forward(x, time, mask).sin()
        return x


class WritingIntoItsOwn(ToyTransformer):
    """Each block writes into the stream, which the model has copied before."""

    copies = True

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlaceBlock() for _ in range(3))
        self.join = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(hidden_states)
        time = x.mean(1) + self.embed_time(timestep[:, None] / 500)
        entry = x
        x = self.blocks[0](x.clone() if self.copies else x, time, None)
        for block in self.blocks[1:]:
            x = block(x, time, None)
        # What was there before the blocks is still needed behind them.
        return self.project(x + self.join(entry))


class WritingAcrossTheCut(WritingIntoItsOwn):
    """The first block writes into what the model embedded, which is read again at the end."""

    copies = False


@pytest.mark.parametrize("kind", [WritingIntoItsOwn, WritingAcrossTheCut])
def test_writes_in_place_are_never_lost(kind: type[WritingIntoItsOwn]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    inputs = [(gaussian(step, 1, 6, 4), torch.tensor([900.0 - 300 * step])) for step in range(3)]
    plain = [model(*each) for each in inputs]
    enabled(model, **ALWAYS)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UncachedWarning)
        with omni_cache.generation(3), omni_cache.branch("cond"):
            got = [model(*each) for each in inputs]
    refused = [each for each in seen if issubclass(each.category, UncachedWarning)]
    if kind is WritingIntoItsOwn:
        assert refused == []
        assert [computed for computed, _ in steps(model)] == [True, False, False]
        assert torch.equal(got[0], plain[0])
        # The prediction is linear in the streams, and the residual is that of the first step.
        entry = [model.embed(each[0]) for each in inputs]
        for index in (1, 2):
            moved = entry[index] - entry[0]
            moved = moved + F.linear(moved, model.join.weight)
            reused = plain[0] + F.linear(moved, model.project.weight)
            torch.testing.assert_close(got[index], reused, rtol=1e-4, atol=1e-5)
    else:
        (warning,) = refused
        assert "writes in place" in str(warning.message)
        assert __file__ in str(warning.message)
        assert all(map(torch.equal, got, plain))


def test_inference_mode() -> None:
    with torch.inference_mode():
        check(FLUX.build(), FLUX)


def test_inference_mode_and_no_grad_share_nothing() -> None:
    """What is made in inference mode cannot be written to outside of it."""
    model = enabled(FLUX.build(), **ALWAYS)
    with omni_cache.generation(4), omni_cache.branch("cond"):
        with torch.inference_mode():
            model(**FLUX.inputs(0))
            model(**FLUX.inputs(7))
        model(**FLUX.inputs(14))
        model(**FLUX.inputs(21))
    assert [computed for computed, _ in steps(model)] == [True, False, True, False]
