"""A tuned plan: each step computes, reuses by weights, or skips the forward, as was found before.

A plan is made once for a model, its scheduler and a number of steps (``omni_cache.tune``), and
followed by the host: no signal, no read from the device, and all ranks agree. The signature of
what it was made on is checked; a guardrail inserts steps where a run goes off the plan's samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from omni_cache.planning.gram import Gram
from omni_cache.strategies.base import is_number, one_of, require
from omni_cache.strategies.following import BranchWeights, Follow, Planned
from omni_cache.strategies.plans import Content, Point
from omni_cache.strategies.retiming import retimed
from omni_cache.strategies.strategy import Found, Guard, Owner, Policy, Strategy

_TOLERANCE = 2e-3
"""Of timesteps, sigmas and guidance, relative; float16 and bfloat16 round them."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Strategy):
    """A tuned plan. It takes none of the fields of `Strategy`. Plans of equal files are equal.

    Attributes:
        content: what its file holds.
        on_mismatch (str, default "raise"): what a run does that differs from the plan's signature:
            "raise" a ValueError that names the field, or "compute" all steps, with a warning.
        guardrail (float, optional, default 1.5): how many times as far off as on the worst of the
            plan's samples a forecast may be before steps are inserted; None to insert none.
        component: which of the plan's transformers this is; None where nobody has said.
        refusal: why all steps of this one are computed.
    """

    name: ClassVar[str] = "plan"

    content: Content
    on_mismatch: str = "raise"
    guardrail: float | None = 1.5
    component: str | None = None
    refusal: str | None = None

    def __post_init__(self) -> None:
        allowed = "left out, since a plan says what each step does"
        for flag in fields(Strategy):
            given = getattr(self, flag.name)
            require(given == flag.default, flag.name, given, allowed)
        one_of("on_mismatch", self.on_mismatch, ("raise", "compute"))
        factor = self.guardrail
        fits = factor is None or (is_number(factor) and factor >= 1)
        require(fits, "guardrail", factor, "a finite number >= 1 or None")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is broken; the message names the field.
        """
        return cls(content=Content.load(path))

    def save(self, path: str | Path) -> None:
        """Write the plan, all points of it, as JSON."""
        self.content.save(path)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """What a user may set beside the plan."""
        return ("on_mismatch", "guardrail")

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The points, from the one that computes least to the one that computes most."""
        return self.content.frontier

    @property
    def point(self) -> Point:
        """The point that is followed."""
        return self.content.point

    def at(self, **target: float) -> Plan:
        """The same plan at another point: the fastest one that reaches a target.

        Args:
            target: one of ``psnr`` (dB), ``ssim``, ``speedup`` or ``computed_steps``. The last two
                choose the best point that is fast enough, or computes no more steps.

        Raises:
            ValueError: there is none, with what there is; or it is no target.
        """
        names = ("psnr", "ssim", "speedup", "computed_steps")
        require(len(target) == 1, "at()", target, f"called with one of {', '.join(names)}")
        ((name, wanted),) = target.items()
        one_of("target", name, names)
        require(is_number(wanted) and wanted > 0, name, wanted, "a number > 0")
        found = [self._value(point, name) for point in self.frontier]
        is_speed, is_count = name == "speedup", name == "computed_steps"
        fits = [
            place
            for place, value in enumerate(found)
            if value is not None and (value <= wanted if is_count else value >= wanted)
        ]
        if not fits:
            known = [f"{value:.4g}" for value in found if value is not None]
            there_is = ", ".join(known) or "nothing, because the plan was not run"
            raise ValueError(f"{name}={wanted!r} is not reached; the plan's points have {there_is}")
        return self.at_point(max(fits) if is_speed or is_count else min(fits))

    def at_point(self, place: int) -> Plan:
        """The same plan at a point of its frontier."""
        return replace(self, content=replace(self.content, chosen=place))

    def _value(self, point: Point, name: str) -> float | None:
        if name == "computed_steps":
            return float(point.computed_steps)
        if name == "speedup":
            whole = self.content.made.seconds
            return None if whole is None or point.seconds is None else whole / point.seconds
        return None if point.quality is None else getattr(point.quality, name)

    def retimed(self, sigmas: Sequence[float]) -> Plan:
        """A plan for other sigmas, or another number of them, without running anything.

        Its points compute the same share of the steps, and are unverified.

        Args:
            sigmas: as ``scheduler.sigmas`` has them after ``set_timesteps``.

        Raises:
            ValueError: they lie outside of those that the plan was made on.
        """
        return replace(self, content=retimed(self.content, sigmas))

    def guard(self) -> Guard:
        """What all points need, so that another one compiles nothing."""
        points = self.frontier
        return Guard(
            None,
            max(each.depth for each in points),
            inputs=any(each.weighs_inputs for each in points),
            skips=any(each.skipped_steps > 0 for each in points),
        )

    def for_transformer(self, owner: Owner) -> Plan:
        """The part of one transformer.

        Raises:
            ValueError: it is another one than the plan was made on, and ``on_mismatch`` says so.
        """
        known = self.content.signature.transformers
        # A module that was tuned alone has no name, nor has one that is enabled alone.
        is_only = len(known) == 1 and "" in (owner.name, *known)
        name = next(iter(known)) if is_only else owner.name
        refusal = None
        if name not in known and owner.name and len(known) == 1:
            # One that no loop of the tuning ran: it may be there, and is refused when it runs.
            refusal = f"transformers are {', '.join(known)} in the plan, and the run has {name!r}"
            return replace(self, component=name, refusal=refusal)
        if name not in known:
            refusal = f"transformers are {', '.join(known)} in the plan, and this is {name!r}"
        elif known[name][0] not in owner.classes:
            refusal = _differs(f"transformers.{name}.model_class", known[name][0], owner.classes[0])
        elif known[name][1] != owner.digest:
            refusal = _differs(f"transformers.{name}.digest", known[name][1], owner.digest)
        elif owner.scheduler is not None:
            refusal = self._other_scheduler(owner.scheduler)
        return replace(self, component=name, refusal=self._refused(refusal))

    def policy(self, model_class: str | None) -> Policy:
        """What the calls of one transformer follow.

        Raises:
            ValueError: the plan is another class's, or has several transformers and nothing says
                which one this is.
        """
        known, name = self.content.signature.transformers, self.component
        if name is None:
            if len(known) > 1:
                raise ValueError(
                    f"transformers are {', '.join(known)} in the plan, and nothing says which one "
                    "this is; enable the pipeline that owns it"
                )
            name = next(iter(known))
            if model_class not in (None, known[name][0]):
                where = f"transformers.{name}.model_class"
                refusal = self._refused(_differs(where, known[name][0], model_class))
                return replace(self, component=name, refusal=refusal).policy(model_class)
            return replace(self, component=name).policy(model_class)
        point = self.point
        branches = {
            branch: BranchWeights(
                point.weights.get(name, {}).get(branch, {}), gram, self.content.spread
            )
            for branch, gram in self._grams.items()
        }
        owners = self.content.signature.owners
        actions = tuple(
            action if owner == name else ""
            for action, owner in zip(point.actions, owners, strict=True)
        )
        gate = Follow(actions, self.guardrail)
        forecast = Planned(
            depth=point.depth,
            actions=actions,
            branches=branches,
            checks=self.guardrail is not None,
        )
        steps = len(owners)
        begins = owners.index(name) if name in owners else None
        return Policy(None, lambda branch, position: gate, forecast, steps, self._mismatch, begins)

    def _mismatch(self, found: Found) -> str | None:
        """What of a run differs from the plan's signature."""
        signature = self.content.signature
        refusal, schedule, size = self.refusal, found.schedule, found.size
        steps, branches = signature.num_inference_steps, self._grams
        if refusal is not None:
            return self._refused(refusal)
        if found.total != steps:
            refusal = _differs("num_inference_steps", steps, found.total)
        elif found.branch not in branches:
            refusal = _differs("branches", ", ".join(branches), found.branch)
        elif schedule is not None:
            refusal = (
                self._other_scheduler(schedule.scheduler)
                or _others("sigmas", signature.sigmas, schedule.sigmas)
                or _others("guidance", _listed(signature.guidance), _listed(schedule.guidance))
            )
        index, value, known = found.at.index, found.at.value, signature.timesteps
        if refusal is None and value is not None and known is not None and index < steps:
            refusal = _others(f"timesteps[{index}]", (known[index],), (value,))
        if refusal is None and size is not None:
            refusal = _differs("size", signature.size, size) if size != signature.size else None
        if refusal is None and found.dtype not in (None, signature.dtype):
            refusal = _differs("dtype", signature.dtype, found.dtype)
        return self._refused(refusal)

    @property
    def _grams(self) -> Mapping[str, Gram]:
        return self.content.grams.get(self.component or "", {})

    def _other_scheduler(self, scheduler: str) -> str | None:
        planned = self.content.signature.scheduler
        if planned in (None, scheduler):
            return None
        return _differs("scheduler", planned, scheduler)

    def _refused(self, refusal: str | None) -> str | None:
        if refusal is not None and self.on_mismatch == "raise":
            raise ValueError(
                f"{refusal}. Tune a plan for this, or pass on_mismatch='compute' to compute all "
                "steps where it does not fit"
            )
        return refusal

    def __repr__(self) -> str:
        signature, point = self.content.signature, self.point
        classes = ", ".join(kind for kind, _ in signature.transformers.values())
        said = f", {point.skipped_steps} skipped" if point.skipped_steps else ""
        said += "" if self.content.made.verified else ", unverified"
        return f"Plan({point.computed_steps} of {len(point.actions)} steps of {classes}{said})"

    def __str__(self) -> str:
        """One line for each step."""
        lines, owners = [repr(self)], self.content.signature.owners
        for step, (action, owner) in enumerate(zip(self.point.actions, owners, strict=True)):
            branches = self.point.weights.get(owner, {})
            rows = [
                f"{name}: "
                + " ".join(f"{weight:+.4f}" for weight in weights.row)
                + (f"  input {weights.input:+.4f}" if weights.input else "")
                for name, found in branches.items()
                if (weights := found.get(step)) is not None
            ]
            lines.append(f"{step:4d}  {action:8s}" + "; ".join(rows))
        return "\n".join(line.rstrip() for line in lines)


def _differs(field: str, planned: Any, found: Any) -> str:
    return f"{field} is {planned!r} in the plan, and the run has {found!r}"


def _listed(number: float | None) -> tuple[float, ...] | None:
    return None if number is None else (number,)


def _others(
    field: str, planned: tuple[float, ...] | None, found: tuple[float, ...] | None
) -> str | None:
    """What differs of numbers that both know; None where nothing does."""
    if planned is None or found is None or planned == found:
        return None
    if len(planned) != len(found):
        return _differs(f"the number of {field}", len(planned), len(found))
    for place, (one, other) in enumerate(zip(planned, found, strict=True)):
        if abs(one - other) > _TOLERANCE * max(abs(one), abs(other)):
            return _differs(f"{field}[{place}]" if len(planned) > 1 else field, one, other)
    return None
