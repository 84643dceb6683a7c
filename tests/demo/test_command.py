"""The demo command: what it measures, says and leaves behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from omni_cache.demo import demo_pipeline_path
from omni_cache.demo.command import (
    HEADINGS,
    as_markdown,
    compile_times,
    demo_captions,
    reached,
    rows,
    run,
    table,
)
from omni_cache.demo.measurement import (
    Generation,
    Measurement,
    StepTrace,
    Variant,
    VariantResult,
)
from omni_cache.quality import Fidelity

STEPS = 10


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run, small and without Inductor: its measurement, and its folder."""
    output = tmp_path_factory.mktemp("demo") / "output"
    measurement = run(
        output,
        prompts=2,
        num_inference_steps=STEPS,
        inner="eager",
        rel_l1_thresholds=[0.0, 0.3],
        magnitude_thresholds=[0.3],
    )
    return measurement, output


@pytest.mark.slow
def test_a_threshold_that_never_reuses_draws_the_uncached_picture(demo):
    measurement, _ = demo
    never = measurement.results[0]

    assert never.computed_steps == STEPS
    for generation, reference in zip(never.generations, measurement.uncached_pictures, strict=True):
        assert np.array_equal(generation.picture, reference)
    assert never.fidelity.psnr is None


@pytest.mark.slow
def test_reuse_computes_fewer_steps_and_draws_nearly_the_same(demo):
    measurement, _ = demo

    for result in measurement.results[1:]:
        assert result.computed_steps < STEPS
        assert 15 < result.fidelity.psnr < 100


@pytest.mark.slow
def test_the_baseline_is_the_uncached_model_with_the_computed_number_of_steps(demo):
    measurement, _ = demo
    never, *others = measurement.results

    assert never.baseline_fidelity.psnr is None
    for result in others:
        assert result.baseline_fidelity.psnr != result.fidelity.psnr
        assert result.baseline_fidelity.psnr < 100


@pytest.mark.slow
def test_the_folder_holds_pictures_and_the_numbers_behind_them(demo):
    measurement, output = demo
    results = json.loads((output / "results.json").read_text())

    assert (output / "results.md").read_text() == as_markdown(measurement)
    for name in ("pictures.png", "timeline.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert [variant["computed_steps"] for variant in results["variants"]] == [
        result.computed_steps for result in measurement.results
    ]
    assert all(
        len(generation["steps"]) == STEPS
        for variant in results["variants"]
        for generation in variant["generations"]
    )
    assert list(results["uncached"]["seconds_per_prompt"]) == demo_captions(2)


@pytest.mark.slow
def test_the_command_ends_with_the_files_to_open_and_is_silent_otherwise(tmp_path):
    output = tmp_path / "a folder with a long name, which a terminal of 80 columns would break"
    flags = ["--inner", "eager", "--prompts", "1", "--steps", "3", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-c", "from omni_cache.cli import app; app()", "demo", *flags],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stderr == ""
    first, second = done.stdout.splitlines()[-2:]
    assert first == f"To see it, open {output / 'pictures.png'} and {output / 'timeline.png'};"
    assert second == f"the numbers are in {output / 'results.md'} and {output / 'results.json'}."
    assert {path.name for path in output.iterdir()} == {
        "pictures.png",
        "timeline.png",
        "results.md",
        "results.json",
    }


@pytest.mark.parametrize(("flag", "least"), [("prompts", 1), ("num_inference_steps", 3)])
def test_nothing_to_measure_is_an_error_that_names_the_flag(flag, least, tmp_path):
    with pytest.raises(ValueError, match=f"{flag} must be at least {least}, and is {least - 1}"):
        run(tmp_path, **{flag: least - 1})


def result(threshold, seconds, psnr, computed=1):
    fidelity = Fidelity(psnr, 0.9)
    steps = tuple(StepTrace(index < computed, None, None, "") for index in range(4))
    picture = np.zeros((8, 8, 3), dtype=np.float32)
    generation = Generation("", seconds, steps, fidelity, seconds, fidelity, picture)
    variant = Variant("MagCache", "magcache", threshold, {})
    return VariantResult(variant, compile_seconds=7.4, generations=(generation,))


def test_the_speedup_reported_for_a_floor_is_the_best_at_or_above_it():
    picture = np.zeros((8, 8, 3), dtype=np.float32)
    results = (result(0.1, 0.5, 36.0), result(0.2, 0.25, 31.0))
    measurement = Measurement(4, ("",), 9.0, (1.0,), (picture,), results)

    assert reached(measurement) == [
        "at PSNR >= 30 dB: 4.00x with MagCache 0.2 (31.0 dB)",
        "at PSNR >= 35 dB: 2.00x with MagCache 0.1 (36.0 dB)",
        "at PSNR >= 40 dB: no variant",
    ]
    assert "uncached 9 s, MagCache 0.1 7 s" in compile_times(measurement)


def test_the_table_fits_80_columns_and_is_the_markdown_one():
    picture = np.zeros((8, 8, 3), dtype=np.float32)
    results = (result(0.1, 123.456, 136.04), result(0.2, 0.25, None))
    measurement = Measurement(28, ("",), 9.0, (1234.5,), (picture,), results)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(measurement))
    shown, markdown = capture.get(), as_markdown(measurement)

    assert "123456" in shown
    assert "…" not in shown
    for row in rows(measurement):
        assert len(row) == len(HEADINGS)
        assert all(cell in shown for cell in row)
        assert f"| {' | '.join(row)} |" in markdown


def test_an_identical_picture_passes_every_floor():
    picture = np.zeros((8, 8, 3), dtype=np.float32)
    measurement = Measurement(4, ("",), 9.0, (1.0,), (picture,), (result(0.1, 0.8, None),))

    assert measurement.best_at(40) is measurement.results[0]


def test_captions_differ_and_begin_with_the_one_of_the_readme():
    captions = demo_captions(20)

    assert captions[0] == "a red circle on a blue background"
    assert len(set(captions)) == 20
    assert captions[:16] == demo_captions(16)


def test_importing_the_demo_imports_nothing_heavy():
    code = (
        "import sys, omni_cache.demo; "
        "print({'diffusers', 'matplotlib', 'skimage', 'transformers'} & sys.modules.keys())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert printed.stdout.strip() == "set()"
    assert demo_pipeline_path().is_dir()
