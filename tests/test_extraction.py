"""An extractor feeds the same executor as a graph does, for models whose blocks no graph holds."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers_models import CASES, sample
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.fx import GraphModule
from toy_transformer import (
    ALWAYS_REUSE,
    CHANNELS,
    MAGCACHE,
    NEVER_REUSE,
    TEACACHE,
    TOKENS,
    Loop,
    ToyTransformer,
    compiled,
    computed,
    gaussian,
    reasons,
    same,
)

import omni_cache
from omni_cache import CacheContext, RegionError, UncachedWarning, register_extractor


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    """Registers extractors for the time of a test."""
    names: list[Any] = []

    def register(model_class: str | type[nn.Module], extractor: Any) -> None:
        names.append(model_class)
        register_extractor(model_class, extractor)

    yield register
    for name in names:
        register_extractor(name, None)


class NumpyToy(ToyTransformer):
    """A toy whose blocks leave the graph: Dynamo breaks within each of them."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, return_dict: bool = False
    ) -> Any:
        context = extract_toy(self, hidden_states, timestep, prompt, return_dict)
        return context.postprocess(context.run_transformer_blocks()[0])


def extract_toy(
    module: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    prompt: Tensor,
    return_dict: bool = False,
) -> CacheContext:
    x = module.embed(hidden_states)
    time = module.embed_prompt(prompt).mean(1) + module.embed_time(timestep.reshape(-1, 1) / 500)
    first = module.blocks[0]
    scale, shift = first.modulation(time)[:, None].chunk(2, -1)

    def run_transformer_blocks() -> tuple[Tensor]:
        y = x
        for block in module.blocks:
            torch._dynamo.graph_break()
            y = block(y, time, None)
        return (y,)

    def postprocess(y: Tensor) -> Any:
        noise = module.project(y)
        return Transformer2DModelOutput(sample=noise) if return_dict else noise

    modulated = first.norm(x) * (1 + scale) + shift
    return CacheContext(modulated, x, None, time, run_transformer_blocks, postprocess)


def enabled(model: nn.Module, **flags: Any) -> nn.Module:
    return omni_cache.enable(model, **{"inner": "eager", **flags})  # type: ignore[no-any-return]


# --- one runtime with two front ends -------------------------------------------------------------


@pytest.mark.parametrize("flags", [TEACACHE, MAGCACHE], ids=["teacache", "magcache"])
@pytest.mark.parametrize("loop", [Loop(), Loop(("cond", "uncond")), Loop(explicit=True)])
def test_it_decides_and_reuses_as_the_graph_of_the_same_model_does(
    loop: Loop, flags: dict[str, Any], registered: Any
) -> None:
    by_graph = compiled(ToyTransformer(), **flags)
    expected = loop.run(by_graph)
    registered(NumpyToy, extract_toy)
    model = enabled(NumpyToy(), **flags)
    got = loop.run(model)
    assert omni_cache.summary(model).reused_steps > 0
    assert computed(model) == computed(by_graph)
    assert reasons(model) == reasons(by_graph)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_with_nothing_reused_it_is_the_model_bit_for_bit(registered: Any) -> None:
    loop = Loop(("cond", "uncond"))
    registered(NumpyToy, extract_toy)
    assert same(loop.run(enabled(NumpyToy(), **NEVER_REUSE)), loop.run(NumpyToy()))


def test_a_second_generation_never_sees_the_first_residual(registered: Any) -> None:
    registered(NumpyToy, extract_toy)
    model = enabled(NumpyToy(), **ALWAYS_REUSE)
    Loop(seed=1).run(model)
    second = Loop(("other",), seed=2).run(model)
    assert same(second, Loop(("other",), seed=2).run(enabled(NumpyToy(), **ALWAYS_REUSE)))


def test_disabling_brings_the_forward_of_the_class_back(registered: Any) -> None:
    registered(NumpyToy, extract_toy)
    model = enabled(NumpyToy(), **ALWAYS_REUSE)
    Loop().run(model)
    assert same(Loop().run(omni_cache.disable(model)), Loop().run(NumpyToy()))


def test_another_output_class_comes_back_as_it_is(registered: Any) -> None:
    registered(NumpyToy, extract_toy)
    model = enabled(NumpyToy(), **ALWAYS_REUSE)
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("p", 1, 5, CHANNELS)
    for timestep in (900.0, 500.0):
        result = model(latents, torch.tensor([timestep]), prompt, return_dict=True)
        assert isinstance(result, Transformer2DModelOutput)
    assert omni_cache.summary(model).reused_steps == 1


def test_another_shape_computes(registered: Any) -> None:
    registered(NumpyToy, extract_toy)
    model = enabled(NumpyToy(), **ALWAYS_REUSE)
    prompt = gaussian("p", 1, 5, CHANNELS)
    with omni_cache.generation(3), omni_cache.branch("cond"):
        for tokens, timestep in ((6, 900.0), (8, 600.0), (8, 300.0)):
            model(gaussian(tokens, 1, tokens, CHANNELS), torch.tensor([timestep]), prompt)
    assert reasons(model) == [["first step", "shape changed", "below threshold"]]


def test_no_nan_is_reused(registered: Any) -> None:
    def broken_blocks(module: Any, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Any:
        context = extract_toy(module, hidden_states, timestep, prompt)
        run = context.run_transformer_blocks
        if float(timestep) > 800:
            context.run_transformer_blocks = lambda: (run()[0] * torch.nan,)
        return context

    registered(NumpyToy, broken_blocks)
    model = enabled(NumpyToy(), **ALWAYS_REUSE)
    latents, prompt = gaussian(0, 1, TOKENS, CHANNELS), gaussian("p", 1, 5, CHANNELS)
    finite = []
    for time in (900.0, 600.0, 300.0):
        finite.append(bool(model(latents, torch.tensor([time]), prompt).isfinite().all()))
        # Not even kept, for gates that read nothing back from a device.
        (trajectory,) = model._compiled_call_impl.state.latest.trajectories.values()
        kept, _ = trajectory.history.kept[0].residuals
        assert kept.isfinite().all()
    assert finite == [False, True, True]
    assert reasons(model) == [["first step", "non-finite residual", "below threshold"]]


class Backend:
    """A compiler that keeps graphs as they are, counts them and their calls, and has their sizes.

    ``dynamic`` says of each graph whether some size of its inputs is left open.
    """

    def __init__(self) -> None:
        self.graphs = self.calls = 0
        self.dynamic: list[bool] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        self.dynamic.append(any(isinstance(each, torch.SymInt) for each in example_inputs))

        def run(*args: Any) -> Any:
            self.calls += 1
            return gm.forward(*args)

        return run


def test_the_blocks_are_compiled_by_the_inner_compiler_and_only_once(registered: Any) -> None:
    registered(NumpyToy, extract_toy)
    inner = Backend()
    model = omni_cache.enable(NumpyToy(), inner=inner, **NEVER_REUSE)
    Loop(steps=2).run(model)
    graphs, calls = inner.graphs, inner.calls
    assert graphs > 0
    Loop(steps=8, seed=1).run(model)
    assert inner.graphs == graphs
    assert inner.calls == 5 * calls


def test_flags_of_torch_compile_reach_the_blocks(registered: Any) -> None:
    registered(NumpyToy, extract_toy)
    for dynamic in (True, False):
        inner = Backend()
        Loop(steps=2).run(enabled(NumpyToy(), inner=inner, dynamic=dynamic, **NEVER_REUSE))
        assert set(inner.dynamic) == {dynamic}
    with pytest.raises(Unsupported, match="graph_break"):
        Loop(steps=2).run(enabled(NumpyToy(), inner=Backend(), fullgraph=True, **NEVER_REUSE))


def test_however_many_models_have_extractors_all_of_their_blocks_are_compiled(
    registered: Any,
) -> None:
    """Dynamo compiles one function only so many times."""

    def in_one_graph(module: Any, *args: Any, **kwargs: Any) -> CacheContext:
        context = extract_toy(module, *args, **kwargs)
        states, time = context.hidden_states, context.temb

        def run_transformer_blocks() -> tuple[Tensor]:
            y = states
            for block in module.blocks:
                y = block(y, time, None)
            return (y,)

        context.run_transformer_blocks = run_transformer_blocks
        return context

    for number in range(torch._dynamo.config.recompile_limit + 2):
        model_class = type(f"NumpyToy{number}", (NumpyToy,), {})
        registered(model_class, in_one_graph)
        inner = Backend()
        Loop(steps=2).run(enabled(model_class(), inner=inner, **NEVER_REUSE))
        assert inner.graphs > 0


def test_blocks_that_are_called_in_more_ways_than_dynamo_allows_are_compiled(
    registered: Any,
) -> None:
    """As many as an enabled model's graph may have."""
    registered(NumpyToy, extract_toy)
    model = enabled(NumpyToy(), inner=(inner := Backend()), dynamic=False, **NEVER_REUSE)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for tokens in (3, 4, 5, 6):
            graphs = inner.graphs
            x, prompt = gaussian("x", 1, tokens, CHANNELS), gaussian("p", 1, 5, CHANNELS)
            model(x, torch.tensor([900.0]), prompt)
            assert inner.graphs > graphs


NEWTON = {**TEACACHE, "forecast": "newton", "forecast_order": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("history_dtype", [None, "float8_e4m3fn", "bfloat16", "float32"])
@pytest.mark.parametrize("flags", [TEACACHE, NEWTON], ids=["hold", "newton"])
def test_residuals_are_kept_and_weighed_as_those_of_a_graph(
    dtype: torch.dtype, history_dtype: str | None, flags: dict[str, Any], registered: Any
) -> None:
    flags = {**flags, "history_dtype": history_dtype}
    registered(InDtype, extract_in_dtype)
    by_graph = compiled(ToyInDtype().to(dtype), **flags)
    model = enabled(InDtype().to(dtype), **flags)
    with torch.no_grad():
        expected, got = Loop().run(by_graph), Loop().run(model)
    assert computed(model) == computed(by_graph)
    assert omni_cache.summary(model).reused_steps > 0
    assert same(got, expected)
    (trajectory,) = model._compiled_call_impl.state.latest.trajectories.values()
    for each in trajectory.history.kept:
        kept = getattr(torch, history_dtype) if history_dtype else dtype
        assert each.stored[0].dtype == kept


class ToyInDtype(ToyTransformer):
    """Takes float32 whatever its dtype."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Any:
        dtype = self.project.weight.dtype
        x, time = self.embed(hidden_states.to(dtype)), self.embed_prompt(prompt.to(dtype)).mean(1)
        time = time + self.embed_time(timestep.to(dtype).reshape(-1, 1) / 500)
        for block in self.blocks:
            x = block(x, time, None)
        return self.project(x).float()


class InDtype(ToyInDtype):
    pass


def extract_in_dtype(
    module: Any, hidden_states: Tensor, timestep: Tensor, prompt: Tensor
) -> CacheContext:
    dtype = module.project.weight.dtype
    given = (each.to(dtype) for each in (hidden_states, timestep, prompt))
    context = extract_toy(module, *given)
    postprocess = context.postprocess
    context.postprocess = lambda y: postprocess(y).float()
    return context


def test_one_registered_after_enable_counts_once_it_is_enabled_again(registered: Any) -> None:
    calls: list[str] = []

    def noting(name: str) -> Callable[..., CacheContext]:
        def extractor(*args: Any, **kwargs: Any) -> CacheContext:
            calls.append(name)
            return extract_toy(*args, **kwargs)

        return extractor

    model = NumpyToy()
    first, second = noting("first"), noting("second")
    registered(NumpyToy, None)
    for extractor, expected in ((None, []), (first, ["first"] * 2), (second, ["second"] * 2)):
        register_extractor(NumpyToy, extractor)
        enabled(model, **ALWAYS_REUSE)
        calls.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UncachedWarning)
            Loop(steps=2).run(model)
        assert calls == expected
    call = model._compiled_call_impl
    enabled(model, **ALWAYS_REUSE)
    assert model._compiled_call_impl is call
    register_extractor(NumpyToy, None)
    enabled(model, **ALWAYS_REUSE)
    assert model._compiled_call_impl is not call


def test_blocks_may_write_into_what_enters_them(registered: Any) -> None:
    def in_place(module: Any, *args: Any, **kwargs: Any) -> CacheContext:
        context = extract_toy(module, *args, **kwargs)
        run = context.run_transformer_blocks
        context.run_transformer_blocks = lambda: (context.hidden_states.copy_(run()[0]),)
        return context

    registered(NumpyToy, extract_toy)
    expected = Loop().run(enabled(NumpyToy(), **TEACACHE))
    registered(NumpyToy, in_place)
    model = enabled(NumpyToy(), **TEACACHE)
    got = Loop().run(model)
    assert omni_cache.summary(model).reused_steps > 0
    assert same(got, expected)


@pytest.mark.parametrize("signal", ["auto", "timestep_embedding"])
def test_what_is_compared_is_the_signal_that_was_asked_for(signal: str, registered: Any) -> None:
    """Only the one of the two changes from step to step."""

    def still(module: Any, *args: Any, **kwargs: Any) -> CacheContext:
        context = extract_toy(module, *args, **kwargs)
        context.modulated_input = torch.ones_like(context.modulated_input)
        return context

    registered(NumpyToy, still)
    flags = {**TEACACHE, "rel_l1_thresh": 1e-6}
    model = enabled(NumpyToy(), signal=signal, **flags)
    Loop().run(model)
    assert (omni_cache.summary(model).reused_steps == 0) == (signal == "timestep_embedding")


def test_with_gradients_strict_refuses(registered: Any) -> None:
    registered(NumpyToy, extract_toy)
    model = enabled(NumpyToy(), strict=True, **ALWAYS_REUSE)
    with torch.enable_grad(), pytest.raises(RegionError, match="gradients are enabled"):
        Loop().run(model)


def test_with_gradients_it_runs_uncached_and_says_so_once(registered: Any) -> None:
    registered(NumpyToy, extract_toy)
    model = enabled(NumpyToy(), **ALWAYS_REUSE)
    with torch.enable_grad(), pytest.warns(UncachedWarning, match="gradients") as seen:
        got = Loop().run(model)
    assert len(seen) == 1
    assert same(got, Loop().run(NumpyToy()))


# --- two streams ---------------------------------------------------------------------------------


class Dual(nn.Module):
    """A stream of latents beside one of words; both take part in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        context = extract_dual(self, hidden_states, timestep, prompt)
        x, words = context.run_transformer_blocks()
        context.encoder_hidden_states = words
        return context.postprocess(x)


def extract_dual(
    module: Any, hidden_states: Tensor, timestep: Tensor, prompt: Tensor
) -> CacheContext:
    def run_transformer_blocks() -> tuple[Tensor, Tensor]:
        return (
            hidden_states + module.scale * prompt.mean(1, keepdim=True) * timestep,
            prompt + hidden_states.mean(1, keepdim=True) * timestep,
        )

    def postprocess(x: Tensor) -> Tensor:
        assert context.encoder_hidden_states is not None
        return x + context.encoder_hidden_states.sum(1, keepdim=True)

    context = CacheContext(
        hidden_states, hidden_states, prompt, None, run_transformer_blocks, postprocess
    )
    return context


def test_both_streams_are_carried_on(registered: Any) -> None:
    registered(Dual, extract_dual)
    model = enabled(Dual(), **ALWAYS_REUSE)
    prompt = gaussian("p", 1, 5, CHANNELS)
    first, second = gaussian(1, 1, TOKENS, CHANNELS), gaussian(2, 1, TOKENS, CHANNELS)
    early, late = torch.tensor([3.0]), torch.tensor([2.0])
    plain = Dual()
    assert torch.equal(model(first, early, prompt), plain(first, early, prompt))
    x, words = extract_dual(plain, first, early, prompt).run_transformer_blocks()
    expected = (second + (x - first)) + (prompt + (words - prompt)).sum(1, keepdim=True)
    torch.testing.assert_close(model(second, late, prompt), expected)
    assert not torch.allclose(expected, plain(second, late, prompt), atol=1e-2)
    assert omni_cache.summary(model).memory_bytes >= first.nbytes + prompt.nbytes


def test_what_leaves_in_another_dtype_is_reused_in_that(registered: Any) -> None:
    def narrowed(module: Any, hidden_states: Tensor, *others: Tensor) -> CacheContext:
        context = extract_dual(module, hidden_states, *others)
        run = context.run_transformer_blocks
        context.run_transformer_blocks = lambda: tuple(each.bfloat16() for each in run())
        context.postprocess = lambda x: x
        return context

    registered(Dual, narrowed)
    model = enabled(Dual(), **ALWAYS_REUSE)
    prompt = gaussian("p", 1, 5, CHANNELS)
    for step in (3, 2, 1):
        left = model(gaussian(step, 1, TOKENS, CHANNELS), torch.tensor([1.0 * step]), prompt)
        assert left.dtype == torch.bfloat16
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.computed for step in trajectory.steps] == [True, False, False]


def test_a_stream_that_the_blocks_do_not_return_stays_as_it_entered(registered: Any) -> None:
    def one(module: Any, *args: Tensor) -> CacheContext:
        context = extract_dual(module, *args)
        run = context.run_transformer_blocks
        context.run_transformer_blocks = lambda: run()[:1]
        return context

    registered(Dual, one)
    model = enabled(Dual(), **NEVER_REUSE)
    x, time, prompt = (
        gaussian(1, 1, TOKENS, CHANNELS),
        torch.tensor([3.0]),
        gaussian("p", 1, 5, CHANNELS),
    )
    left = extract_dual(model, x, time, prompt).run_transformer_blocks()[0]
    assert torch.equal(model(x, time, prompt), left + prompt.sum(1, keepdim=True))


# --- a model of diffusers that no graph holds ----------------------------------------------------


def extract_hidream(
    module: Any,
    hidden_states: Tensor,
    timesteps: Tensor,
    encoder_hidden_states_t5: Tensor,
    encoder_hidden_states_llama3: Tensor,
    pooled_embeds: Tensor,
    return_dict: bool = True,
) -> CacheContext:
    """One stream runs through all blocks; of the text, a part enters each block anew."""
    batch = hidden_states.shape[0]
    dtype = hidden_states.dtype
    x, masks, sizes, ids = module.patchify(hidden_states)
    x = module.x_embedder(x)
    temb = module.t_embedder(timesteps, dtype) + module.p_embedder(pooled_embeds)
    given = [encoder_hidden_states_llama3[k] for k in module.config.llama_layers]
    given.append(encoder_hidden_states_t5)
    texts = [
        project(text).view(batch, -1, x.shape[-1])
        for project, text in zip(module.caption_projection, given, strict=True)
    ]
    words = texts[-1].shape[1] + texts[-2].shape[1] + texts[0].shape[1]
    ids = torch.cat([ids, ids.new_zeros(batch, words, 3)], 1)
    rotary = module.pe_embedder(ids)

    def run_transformer_blocks() -> tuple[Tensor]:
        y, text = x, torch.cat([texts[-1], texts[-2]], 1)
        length = text.shape[1]
        remaining = iter(texts)
        for block in module.double_stream_blocks:
            y, text = block(
                hidden_states=y,
                hidden_states_masks=masks,
                encoder_hidden_states=torch.cat([text, next(remaining)], 1),
                temb=temb,
                image_rotary_emb=rotary,
            )
            text = text[:, :length]
        y = torch.cat([y, text], 1)
        joint = y.shape[1]
        all_masks = torch.cat([masks, masks.new_ones(batch, length + texts[0].shape[1])], 1)
        for block in module.single_stream_blocks:
            y = block(
                hidden_states=torch.cat([y, next(remaining)], 1),
                hidden_states_masks=all_masks,
                temb=temb,
                image_rotary_emb=rotary,
            )[:, :joint]
        return (y[:, : x.shape[1]],)

    def postprocess(y: Tensor) -> Any:
        output = module.unpatchify(module.final_layer(y, temb), sizes, module.training)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    first = module.double_stream_blocks[0].block
    shift, scale = first.adaLN_modulation(temb)[:, None].chunk(12, dim=-1)[:2]
    modulated = first.norm1_i(x) * (1 + scale) + shift
    return CacheContext(modulated, x, None, temb, run_transformer_blocks, postprocess)


def test_hidream_is_cached_by_an_extractor(registered: Any) -> None:
    case = CASES["hidream_image"]
    model = case.build()
    expected = [sample(model(**case.inputs(step))) for step in range(3)]
    registered("HiDreamImageTransformer2DModel", extract_hidream)

    def loop() -> list[Tensor]:
        with omni_cache.generation(3), omni_cache.branch("cond"):
            return [sample(model(**case.inputs(step))) for step in range(3)]

    enabled(model, **NEVER_REUSE)
    assert same(loop(), expected)
    assert computed(model) == [[True, True, True]]
    enabled(model, **ALWAYS_REUSE)
    got = loop()
    assert computed(model) == [[True, False, False]]
    assert torch.equal(got[0], expected[0])
    first = extract_hidream(model, **case.inputs(0))
    residual = first.run_transformer_blocks()[0] - first.hidden_states
    for step in (1, 2):
        context = extract_hidream(model, **case.inputs(step))
        reused = sample(context.postprocess(context.hidden_states + residual))
        torch.testing.assert_close(got[step], reused, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got[step], expected[step], rtol=1e-2)


# --- what is refused -----------------------------------------------------------------------------

X = torch.zeros(2, 3, 4)
CONTEXT = CacheContext(X, X, None, X, lambda: (X,), lambda x: x)

WRONG = {
    "modulated_input": (TypeError, "list", {"modulated_input": [1.0]}),
    "hidden_states": (TypeError, "NoneType", {"hidden_states": None}),
    "encoder_hidden_states": (TypeError, "tuple", {"encoder_hidden_states": (X,)}),
    "temb": (TypeError, "float", {"temb": 1.0}),
    "no temb": (TypeError, "NoneType", {"temb": None}),
    "extra_states": (TypeError, "list", {"extra_states": []}),
    "run_transformer_blocks": (TypeError, "Tensor", {"run_transformer_blocks": X}),
    "postprocess": (TypeError, "NoneType", {"postprocess": None}),
    "blocks with an argument": (RuntimeError, "(x)", {"run_transformer_blocks": lambda x: (x,)}),
    "postprocess without one": (RuntimeError, "()", {"postprocess": lambda: X}),
    "postprocess with two": (RuntimeError, "(x, y)", {"postprocess": lambda x, y: x}),
    "batch sizes": (ValueError, "(1, 3, 4)", {"modulated_input": X[:1]}),
    "integers": (ValueError, "torch.int64", {"hidden_states": X.long()}),
    "a number": (ValueError, "()", {"hidden_states": X[0, 0, 0]}),
    "devices": (ValueError, "on meta", {"temb": X.to("meta")}),
}


@pytest.mark.parametrize("name", WRONG)
def test_validate_names_the_field_and_what_it_was_given(name: str) -> None:
    error, given, fields = WRONG[name]
    CONTEXT.validate()
    with pytest.raises(error) as caught:
        replace(CONTEXT, **fields).validate()
    (field,) = fields
    assert str(caught.value).startswith(field)
    assert given in str(caught.value)


LEAVING = {
    "a tensor": (TypeError, "returning Tensor", X),
    "two streams of one": (TypeError, "returning 2 values", (X, X)),
    "nothing": (TypeError, "returning 0 values", ()),
    "another shape": (ValueError, r"\(2, 2, 4\).*\(2, 3, 4\)", (X[:, :2],)),
}


@pytest.mark.parametrize("name", LEAVING)
def test_what_leaves_the_blocks_is_checked(name: str, registered: Any) -> None:
    error, message, left = LEAVING[name]
    registered(Dual, lambda *_: replace(CONTEXT, run_transformer_blocks=lambda: left))
    model = enabled(Dual(), **ALWAYS_REUSE)
    with pytest.raises(error, match=f"^run_transformer_blocks=.*{message}"):
        model(X, torch.tensor([3.0]), X)


def test_contexts_are_checked_at_every_call(registered: Any) -> None:
    registered(Dual, lambda *_: replace(CONTEXT, modulated_input=X[:1]))
    model = enabled(Dual(), **ALWAYS_REUSE)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^modulated_input=of shape \(1, 3, 4\)"):
            model(X, torch.tensor([3.0]), X)


def test_an_extractor_has_to_return_a_context(registered: Any) -> None:
    registered(Dual, lambda *_: (X, X))
    with pytest.raises(TypeError, match="extractor of Dual returned a tuple"):
        enabled(Dual(), **ALWAYS_REUSE)(X, torch.tensor([3.0]), X)


def test_the_context_class_of_another_package_serves(registered: Any) -> None:
    @dataclass
    class Foreign(CacheContext):
        pass

    Foreign.__name__ = "CacheContext"
    registered(Dual, lambda *args: Foreign(**vars(extract_dual(*args))))
    model = enabled(Dual(), **NEVER_REUSE)
    x, time = gaussian(1, 1, TOKENS, CHANNELS), torch.tensor([3.0])
    model(x, time, gaussian("p", 1, 5, CHANNELS))
    assert omni_cache.summary(model).computed_steps == 1


def test_flags_that_only_a_graph_understands_are_refused(registered: Any) -> None:
    registered(NumpyToy, extract_toy)
    with pytest.raises(ValueError, match=r"^region="):
        enabled(NumpyToy(), region=["blocks"], **TEACACHE)
    with pytest.raises(ValueError, match=r"^hoist=True .*no graph"):
        enabled(NumpyToy(), hoist=True, **TEACACHE)
    with pytest.raises(ValueError, match=r"^signal='blocks\.0\.norm'"):
        enabled(NumpyToy(), signal="blocks.0.norm", **TEACACHE)
    enabled(NumpyToy(), signal="timestep_embedding", **TEACACHE)
    # Latents are what only the extractor knows, and says at a call or not.
    latentless = enabled(NumpyToy(), cache="seacache")
    x, time = gaussian(1, 1, TOKENS, CHANNELS), torch.tensor([3.0])
    with torch.no_grad(), pytest.warns(omni_cache.UncachedWarning, match="sea_cache_latents"):
        latentless(x, time, gaussian("p", 1, 5, CHANNELS))
    enabled(NumpyToy(), cache="seacache", signal="auto")
    with pytest.raises(ValueError, match=r"^cache=one that skips the whole model is not allowed"):
        enabled(NumpyToy(), cache="stepcache")


def test_what_is_registered_is_checked() -> None:
    with pytest.raises(TypeError, match=r"^model_class=3"):
        register_extractor(3, extract_toy)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^extractor='f'"):
        register_extractor("Toy", "f")  # type: ignore[arg-type]


def test_it_counts_for_subclasses_and_until_it_is_taken_back(registered: Any) -> None:
    calls = types.SimpleNamespace(count=0)

    def counted(*args: Any, **kwargs: Any) -> CacheContext:
        calls.count += 1
        return extract_toy(*args, **kwargs)

    class Derived(NumpyToy):
        pass

    registered("NumpyToy", counted)
    Loop(steps=2).run(enabled(Derived(), **TEACACHE))
    assert calls.count == 2
    Loop(steps=2).run(enabled(Derived(), cache="none"))
    assert calls.count == 2
    register_extractor(NumpyToy, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Loop(steps=2).run(enabled(Derived(), **TEACACHE))
    assert calls.count == 2
