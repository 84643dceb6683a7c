"""A strategy: what a user writes, as flags, and the two objects that it makes of itself.

The ``Guard`` is what a graph is compiled for; the ``Policy`` is what the calls of one model follow,
so that other thresholds compile nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from omni_cache.strategies.base import Forecast, Gate, Signal, Time, is_count, is_number, require
from omni_cache.strategies.forecasts import make_forecast


@dataclass(frozen=True)
class PublishedSource:
    """The signal that the published table of a model's class names."""

    variant: str | None
    find: Callable[[str | None, str | None], str]

    def __repr__(self) -> str:
        # What is compiled for equal guards is shared by their text.
        return f"PublishedSource({self.variant!r})"


class Owner(NamedTuple):
    """A transformer that a strategy is for.

    Attributes:
        name: of the component in its pipeline, "" for a bare module.
        classes: names of the classes that it is made of, its own first.
        digest: equal for transformers of one configuration.
        scheduler: the class of the pipeline's scheduler; None where there is none.
    """

    name: str
    classes: tuple[str, ...]
    digest: str
    scheduler: str | None


class Schedule(NamedTuple):
    """What a pipeline says of a generation that begins.

    Attributes:
        scheduler: its class.
        sigmas: of the scheduler, or its timesteps where it has none.
        guidance: the guidance scale, None where the pipeline has none.
    """

    scheduler: str
    sigmas: tuple[float, ...]
    guidance: float | None


class Found(NamedTuple):
    """What a call turns out to be a part of.

    Attributes:
        at: where it lies.
        total: how many steps there are; None where nobody has said.
        branch: the guidance branch.
        schedule: None where no pipeline is known.
        size: shape of the model's first result, without the batch; None before the first call.
        dtype: of it.
    """

    at: Time
    total: int | None
    branch: str
    schedule: Schedule | None
    size: tuple[int, ...] | None
    dtype: str | None


@dataclass(frozen=True)
class Guard:
    """What a graph is compiled for. Equal guards share what is compiled.

    Attributes:
        source: which signal the graph delivers (see ``passes.find_signal``), None for none.
        depth: how many residuals the reused step takes.
        first: how many blocks at the beginning of the block loop always run.
        last: how many blocks at its end always run.
        whole: whether the region is the whole model, so that a reused step runs nothing of it.
        inputs: whether the reused step weighs too what enters the region, now and at the newest
            computed step.
        skips: whether a call may skip the whole forward, which has its results kept.
        within: what decides in the graph itself, so that the graph is for it alone; None where the
            host decides.
    """

    source: str | PublishedSource | None
    depth: int
    first: int = 0
    last: int = 0
    whole: bool = False
    inputs: bool = False
    skips: bool = False
    within: Strategy | None = field(default=None, hash=False)  # whose fields may be lists

    def source_of(self, model_class: str | None) -> str | None:
        """The signal for a model's class."""
        source = self.source
        if isinstance(source, PublishedSource):
            return source.find(model_class, source.variant)
        return source

    def lacks(self, wanted: Guard, model_class: str | None, signal: str | None) -> str | None:
        """What a graph that was compiled for this guard lacks to serve another one; None for none.

        Args:
            wanted: the other guard.
            model_class: name of the model's class.
            signal: the signal that a flag names whatever a guard says, None without such a flag.
        """
        if wanted.depth == 0:  # nothing is reused
            return None
        if wanted.whole != self.whole:
            regions = ("its blocks", "the whole model")
            return f"{regions[wanted.whole]} as the region, where it has {regions[self.whole]}"
        if self.within is not None and self.within != wanted.within:
            return f"a decision of its own, where the graph decides by {self.within}"
        span, wanted_span = (self.first, self.last), (wanted.first, wanted.last)
        if span != wanted_span:
            return "{} first and {} last blocks that always run, where it has {} and {}".format(
                *wanted_span, *span
            )
        if wanted.depth > self.depth:
            return f"{wanted.depth} kept residuals, where it has {self.depth} (forecast_order)"
        if wanted.inputs and not self.inputs:
            return "reused steps that weigh what enters the blocks"
        if wanted.skips and not self.skips:
            return "results that are kept, so that a call may skip the forward"
        source, own = wanted.source_of(model_class), self.source_of(model_class)
        if source is None or (own is not None and signal is not None) or source == own:
            return None
        return f"the signal {source!r}, where it has {own!r}"


@dataclass(frozen=True)
class Policy:
    """What the calls of one model follow.

    Attributes:
        signal: what is compared, None for a gate that measures nothing.
        gate: makes the gate of a branch, from its name and its position in the generation.
        forecast: what stands in for the residual.
        num_inference_steps: steps of a generation, where neither a context nor a pipeline says.
        refuses: why a call has to be computed whatever the gate says, because it is none that the
            strategy was made for; None for a strategy that is for all. It may raise instead.
        begins: the step that loops begin with where the strategy was made from whole ones; one
            that begins later is warned of. None where it makes no difference.
    """

    signal: Signal | None
    gate: Callable[[str, int], Gate]
    forecast: Forecast
    num_inference_steps: int | None
    refuses: Callable[[Found], str | None] | None = None
    begins: int | None = None

    @cached_property
    def depth(self) -> int:
        """How many residuals have to be kept."""
        return max(self.forecast.depth, 0 if self.signal is None else self.signal.looks_back)

    @cached_property
    def reads_values(self) -> bool:
        """Whether a call's timestep has to be known, whatever its place."""
        compares = self.signal is not None and self.signal.reads_values
        return compares or self.forecast.reads_values


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """Base of the strategies that users write. Subclasses check their fields on construction.

    Attributes:
        num_inference_steps (int, optional): steps of a generation, where neither a pipeline nor a
            context says.
        start (float, default 0): share of the steps before which all are computed.
        end (float, default 1): share of the steps from which on all are computed.
        forecast (str, default "hold"): what stands in for the residual: the name of a forecast
            ("hold", "newton", "taylor", "hermite", "adams", "foca", "chebyshev", "dmd", or one that
            was registered), fitted weights by steps, or a :class:`Forecast`.
        forecast_order (int, optional): order of the forecast, which has a default of its own.
        forecast_axis (str, default "sigma"): what "newton" extrapolates in: "sigma", the timestep
            argument, or "step", its index.
    """

    name: ClassVar[str]

    num_inference_steps: int | None = None
    start: float = 0.0
    end: float = 1.0
    forecast: str | Forecast | Mapping[int, Sequence[float]] | Sequence[Any] = "hold"
    forecast_order: int | None = None
    forecast_axis: str = "sigma"

    def __post_init__(self) -> None:
        steps = self.num_inference_steps
        allowed = "an integer >= 1 or None"
        require(steps is None or is_count(steps, 1), "num_inference_steps", steps, allowed)
        for flag in ("start", "end"):
            share = getattr(self, flag)
            require(is_number(share) and 0 <= share <= 1, flag, share, "a number from 0 to 1")
        require(self.start <= self.end, "start", self.start, f"at most end, {self.end!r}")
        self.forecasting()

    def forecasting(self) -> Forecast:
        """The forecast that the flags name."""
        return make_forecast(self.forecast, self.forecast_order, self.forecast_axis)

    @abstractmethod
    def guard(self) -> Guard:
        """What graphs are compiled for."""

    def guard_within(self) -> Guard:
        """What graphs are compiled for that decide by themselves, for any number of steps."""
        return replace(self.guard(), within=replace(self, num_inference_steps=None))

    @abstractmethod
    def policy(self, model_class: str | None) -> Policy:
        """What calls of a model class follow (None where the class is unknown).

        Raises:
            ValueError: the strategy lacks numbers for this class.
        """

    def for_transformer(self, owner: Owner) -> Strategy:
        """The strategy of one transformer of a pipeline, checked against it.

        Raises:
            ValueError: the strategy has numbers of another model.
        """
        return self

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the strategy's flags."""
        return tuple(each.name for each in fields(cls))
