"""Every kernel compiles to machine code for every supported GPU, on a machine without one."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_implementations import INTERPRETED

triton = pytest.importorskip("triton")

from omni_cache.kernels import magnitude, rel_l1  # noqa: E402
from omni_cache.kernels.grid import WARPS, tile_shape  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
EVERY_TARGET = pytest.mark.parametrize("target", TARGETS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())


@pytest.fixture(scope="module", autouse=True)
def _nothing_from_an_earlier_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_for(
    target: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, int],
    *,
    integers: str = "i32",
    aligned: bool = True,
    warps: int = WARPS,
) -> dict[str, Any]:
    """Compile what a launch would: element types of pointers, constexprs and integers that are 1.

    `aligned` says that all addresses and all other integers are multiples of 16, as a launch finds
    out by itself. Returns the compiler's outputs by stage.
    """
    signature = {}
    for parameter in kernel.params:
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
        elif parameter.name in pointers:
            signature[parameter.name] = "*" + pointers[parameter.name]
        else:
            signature[parameter.name] = parameter.annotation_type or integers
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, kind in enumerate(signature.values())
        if aligned and (kind == integers or kind.startswith("*"))
    }
    compiled: dict[str, Any] = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=TARGETS[target],
        options={"num_warps": warps, "enable_fp_fusion": False},
    ).asm
    return compiled


def rel_l1_gate_for(target: str, dtype: torch.dtype, layout: str, **options: Any) -> dict[str, Any]:
    shapes = {
        "contiguous": (1, 4096 * 3072, 1),
        "rows": (4096, 3072, 1),
        "transposed": (4096, 3072, 4096),
    }
    units = {
        "contiguous": {"rows": 1, "inner_rows": 1, "column_stride": 1},
        "rows": {"column_stride": 1},
        "transposed": {},
    }
    tile_rows, tile_columns = tile_shape(*shapes[layout], dtype)
    pointers = {
        "current_ptr": TYPES[dtype],
        "previous_ptr": TYPES[dtype],
        "accumulated_ptr": "fp64",
        "workspace_ptr": "fp32",
        "coefficients_ptr": "fp64",
        "verdict_ptr": "fp64",
    }
    tile = {"TILE_ROWS": tile_rows, "TILE_COLUMNS": tile_columns}
    constants = {"COEFFICIENTS": 5, "PARTIALS": 1024} | tile | units[layout]
    return compile_for(target, rel_l1.rel_l1_gate_kernel, pointers, constants, **options)


def magnitude_stats_for(
    target: str, dtype: torch.dtype, column_stride: int, **options: Any
) -> dict[str, Any]:
    tile_tokens, tile_columns = tile_shape(4096, 3072, column_stride, dtype)
    pointers = {
        "residual_ptr": TYPES[dtype],
        "previous_ptr": TYPES[dtype],
        "workspace_ptr": "fp64",
        "stats_ptr": "fp32",
    }
    constants = {"PARTIALS": 1024, "TILE_TOKENS": tile_tokens, "TILE_COLUMNS": tile_columns}
    if column_stride == 1:
        constants |= {"residual_column": 1, "previous_column": 1}
    return compile_for(target, magnitude.magnitude_stats_kernel, pointers, constants, **options)


def machine_code(compiled: dict[str, Any]) -> bytes:
    code: bytes = compiled["cubin"] if "cubin" in compiled else compiled["hsaco"]
    return code


@EVERY_TARGET
@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_rel_l1_gate_compiles(target: str, dtype: torch.dtype, layout: str) -> None:
    assert machine_code(rel_l1_gate_for(target, dtype, layout)).startswith(b"\x7fELF")


@EVERY_TARGET
def test_rel_l1_gate_compiles_for_unaligned_strided_and_huge_tensors(target: str) -> None:
    compiled = rel_l1_gate_for(target, torch.bfloat16, "transposed", integers="i64", aligned=False)
    assert machine_code(compiled).startswith(b"\x7fELF")


@EVERY_TARGET
@EVERY_DTYPE
def test_magnitude_stats_compile(target: str, dtype: torch.dtype) -> None:
    assert machine_code(magnitude_stats_for(target, dtype, 1)).startswith(b"\x7fELF")


@EVERY_TARGET
def test_magnitude_stats_compile_for_unaligned_strided_and_huge_tensors(target: str) -> None:
    compiled = magnitude_stats_for(target, torch.bfloat16, 3, integers="i64", aligned=False)
    assert machine_code(compiled).startswith(b"\x7fELF")


@EVERY_TARGET
def test_magnitude_gate_compiles(target: str) -> None:
    pointers = {"state_ptr": "fp64", "ratio_ptr": "fp64", "verdict_ptr": "fp64"}
    compiled = compile_for(target, magnitude.magnitude_gate_kernel, pointers, {}, warps=1)
    assert machine_code(compiled).startswith(b"\x7fELF")


@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_rel_l1_gate_moves_sixteen_bytes_per_access(dtype: torch.dtype, layout: str) -> None:
    ptx = rel_l1_gate_for("sm_90", dtype, layout)["ptx"]
    assert ptx.count("ld.global.v4.b32") == 2
    assert ptx.count("st.global.v4.b32") == 1


@EVERY_DTYPE
def test_magnitude_stats_read_sixteen_bytes_per_access(dtype: torch.dtype) -> None:
    assert magnitude_stats_for("sm_90", dtype, 1)["ptx"].count("ld.global.v4.b32") == 2


def test_the_last_program_is_found_by_an_integer_atomic_that_acquires_and_releases() -> None:
    ptx = rel_l1_gate_for("sm_90", torch.bfloat16, "contiguous")["ptx"]
    assert re.findall(r"\b(?:atom|red)\.\S+", ptx) == ["atom.global.gpu.acq_rel.add.u32"]


@pytest.mark.parametrize(
    "kernel", [rel_l1.rel_l1_gate_kernel, magnitude.magnitude_gate_kernel], ids=lambda k: k.__name__
)
def test_the_threshold_is_a_run_time_argument_in_double_precision(kernel: Any) -> None:
    (threshold,) = (p for p in kernel.params if p.name == "threshold")
    assert (threshold.annotation_type, threshold.is_constexpr) == ("fp64", False)
