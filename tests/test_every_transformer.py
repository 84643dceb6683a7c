"""Every transformer of diffusers that is covered computes and reuses as its eager model says.

What the report in docs/ has as covered is held to it here, so that a class that no longer is shows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import omni_cache.passes
import pytest
import torch
from cross_section import cross_section
from diffusers_models import CASES, NOT_DENOISING, REPRESENTATIVES, ModelCase, sample
from eager_reference import capture_residual, forced_reuse
from one_trace import OneTrace, cached
from report_coverage import ClassReport, load, lost, transformer_classes
from torch import Tensor, nn
from torch._dynamo import lookup_backend

import omni_cache
from omni_cache.capture.function import CapturedFunction

REPORT = Path(__file__).parent.parent / "docs" / "coverage.md"
REPORTS = {each.class_name: each for each in load(REPORT)}
STEPS = (0, 7, 14)

OTHERS = {
    name: case
    for name, case in CASES.items()
    if name not in REPRESENTATIVES and REPORTS[case.class_name].status == "covered"
}
"""The covered classes that no other test looks at."""

CROSS_SECTION = {
    "aura_flow": "blocks of two streams, then of one",
    "consisid": "modules between the blocks, both streams go on",
    "cosmos3_omni": "two streams that both go on, which no modulated norm tells apart",
    "ernie_image": "the sequence is the first axis",
    "hunyuan_dit": "U-shaped: late blocks read what early ones made",
    "latte": "two lists of blocks in turn",
    "omnigen": "several graphs, because of graph breaks",
    "prior": "a single vector with learned tokens beside it, no modulated norm",
    "wan_vace": "control blocks before the others",
}
"""What differs in structure from the representatives and from one another."""

IDENTITY: dict[str, Any] = {"cache": "teacache", "coefficients": (1.0, 0.0)}


def relative_change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


@pytest.mark.parametrize("case", cross_section(OTHERS, CROSS_SECTION))
@torch.no_grad()
def test_it_is_exact_and_reuses_what_the_eager_formula_says(case: ModelCase) -> None:
    model = case.build()
    trace = OneTrace(
        {
            "plain": lookup_backend("eager"),
            "never": cached(**IDENTITY, rel_l1_thresh=0),
            "always": cached(**IDENTITY, rel_l1_thresh=1e6),
        }
    )
    compiled = CapturedFunction(model, backend=trace)

    def loop(name: str) -> list[Tensor]:
        trace.chosen = name
        omni_cache.refresh(model)
        # Named, because a graph behind a break does not know the timestep.
        with omni_cache.generation(len(STEPS)), omni_cache.branch("cond"):
            return [sample(compiled(**case.inputs(step))) for step in STEPS]

    plain = loop("plain")
    assert all(each.isfinite().all() for each in plain)
    assert all(map(torch.equal, loop("never"), plain))
    reused = loop("always")
    (trajectory,) = omni_cache.summary(model).trajectories
    assert [step.computed for step in trajectory.steps] == [True, False, False]
    assert torch.equal(reused[0], plain[0])
    residual = capture_residual(model, case, case.inputs(STEPS[0]))
    for index in (1, 2):
        expected = forced_reuse(model, case, case.inputs(STEPS[index]), residual)
        torch.testing.assert_close(reused[index], expected, rtol=1e-4, atol=1e-5)
        # What it must not be lies far outside that tolerance.
        assert relative_change(reused[index], plain[index]) > 1e-3


# --- the report ----------------------------------------------------------------------------------


def test_the_report_has_every_class_that_diffusers_exports() -> None:
    assert set(REPORTS) | set(NOT_DENOISING) == set(transformer_classes())
    assert not set(REPORTS) & set(NOT_DENOISING)
    assert {case.class_name for case in CASES.values()} == set(REPORTS)
    assert set(CROSS_SECTION) <= set(OTHERS)


def test_nearly_all_classes_are_covered_with_nearly_all_of_their_arithmetic() -> None:
    covered = [each for each in REPORTS.values() if each.status == "covered"]
    assert len(covered) >= 0.95 * len(REPORTS)
    for each in covered:
        assert all(each.pairs), each.class_name
        assert each.share >= 0.85, each.class_name
    for each in REPORTS.values():
        assert each.status == "covered" or each.reason, each.class_name


def test_a_class_that_is_no_longer_covered_is_lost() -> None:
    before = [ClassReport("A", "covered"), ClassReport("B", "covered"), ClassReport("C", "refused")]
    now = [ClassReport("A", "covered"), ClassReport("B", "held"), ClassReport("C", "refused")]
    assert lost(before, now) == ["B"]
    assert lost([], now) == []


def test_the_pass_names_no_class_block_or_attribute_of_diffusers() -> None:
    known = {case.class_name for case in CASES.values()} | set(NOT_DENOISING)
    for case in REPRESENTATIVES.values():
        for path, module in case.build().named_modules():
            if type(module).__module__.startswith("diffusers"):
                known.add(type(module).__name__)
            if isinstance(module, nn.ModuleList):
                known.add(path.rpartition(".")[2])
    for case in CASES.values():
        known.update(each.rpartition(".")[2] for each in (*case.streams, *case.added))
    known -= {"blocks", "layers"}  # words that mean any model's
    assert {"FluxTransformer2DModel", "FluxTransformerBlock", "transformer_blocks"} <= known

    for source in sorted(Path(omni_cache.passes.__file__).parent.glob("*.py")):
        words = set(re.findall(r"\w+", source.read_text(encoding="utf-8")))
        assert not words & known, source.name
