"""docs/own_strategies.md runs as it stands, and what may be registered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_transformer import NEVER_REUSE, Loop, ToyTransformer, compiled, computed, reasons

import omni_cache
from omni_cache.strategies import STRATEGIES, Guard, Policy, Strategy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_strategies.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(STRATEGIES)
    with torch.no_grad():
        yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


def run_block(source: str, names: dict[str, Any]) -> None:
    exec(compile(source, PAGE, "exec", dont_inherit=True), names)


def test_the_page_runs() -> None:
    masked, enabling, relaxing, enabling_it = BLOCKS
    model = ToyTransformer()
    names: dict[str, Any] = {"__name__": "a_users_module", "model": model}
    run_block(masked, names)
    run_block(enabling, names)
    with omni_cache.generation(8):
        Loop().run(model)
    # The mask is 1 1 0 0 1 0 0 1 for eight steps of "ultra".
    assert computed(model) == [[True, True, False, False, True, False, False, True]]
    with omni_cache.generation(8, cache="masked", mask="ultra", running=1):
        Loop().run(model)
    assert computed(model) == [[True, True, False, True, True, False, True, True]]
    run_block(relaxing, names)
    run_block(enabling_it, names)
    Loop(explicit=True).run(model)
    assert set(reasons(model)[0]) == {"first step", "relaxing"}
    assert 1 < sum(computed(model)[0]) < 8
    # Each in under 30 lines, blank ones aside.
    assert all(len([line for line in each.splitlines() if line]) < 30 for each in BLOCKS)


def made(name: Any, base: type = Strategy) -> type[Strategy]:
    @dataclass(frozen=True, kw_only=True)
    class Mine(base):  # type: ignore[misc]
        level: float = 0.5

        def guard(self) -> Guard:
            return Guard(None, 1)

        def policy(self, model_class: str | None) -> Policy:
            raise NotImplementedError

    Mine.name = name  # type: ignore[attr-defined]
    return Mine


def test_a_name_and_its_flags_are_taken_everywhere() -> None:
    mine = omni_cache.register_strategy(made("mine"))
    assert omni_cache.register_strategy(made("mine")) is not mine  # a cell that runs twice
    with pytest.raises(ValueError, match=r"did you mean 'level'\?; allowed are: .*level"):
        omni_cache.enable(ToyTransformer(), cache="mine", levle=1)
    with pytest.raises(ValueError, match=r"'level' for cache='teacache' \(it belongs to .*'mine'"):
        omni_cache.enable(ToyTransformer(), level=1)
    with (
        pytest.raises(ValueError, match="did you mean 'mine'"),
        omni_cache.generation(cache="mien"),
    ):
        pass


@pytest.mark.parametrize("name", ["teacache", "none", "two words", "", None, 3])
def test_a_name_that_cannot_be_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=f"^name={name!r} is not allowed; name must be "):
        omni_cache.register_strategy(made(name))


def test_what_is_no_strategy_is_refused() -> None:
    class Abstract(Strategy):
        name = "abstract"

    class Bare(made("bare")):  # type: ignore[misc]
        more: int = 1

    for given, message in (
        (object, "must be a class over Strategy"),
        ("teacache", "must be a class over Strategy"),
        (Abstract, "it lacks guard, policy"),
        (Bare, r"put @dataclass\(frozen=True, kw_only=True\) above it"),
    ):
        with pytest.raises(TypeError, match=message):
            omni_cache.register_strategy(given)  # type: ignore[arg-type]
    assert "abstract" not in STRATEGIES


def test_an_own_strategy_serves_graphs_that_were_compiled_for_another() -> None:
    run_block(BLOCKS[0], {"__name__": "a_users_module"})
    model = ToyTransformer()
    run = compiled(model, **NEVER_REUSE)
    with omni_cache.generation(8, cache="masked"):
        Loop().run(run)
    assert 1 < sum(computed(model)[0]) < 8
