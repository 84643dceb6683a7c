"""Every kernel compiles to machine code for every supported GPU, on a machine without one."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from kernel_implementations import INTERPRETED

triton = pytest.importorskip("triton")

from omni_cache.kernels import contents, distance, magnitude, products  # noqa: E402
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
# One of each vendor; each kernel is compiled once for the others, too.
FEW = ("sm_90", "gfx942")
EVERY_TARGET = pytest.mark.parametrize(
    "target",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive) for name in TARGETS],
)
ALL_TARGETS = pytest.mark.parametrize("target", TARGETS)
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
    constants: dict[str, Any],
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
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter, kind in zip(kernel.params, signature.values(), strict=True)
        if aligned
        and not parameter.do_not_specialize
        and (kind == integers or kind.startswith("*"))
    }
    compiled: dict[str, Any] = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=TARGETS[target],
        options={"num_warps": warps, "enable_fp_fusion": False},
    ).asm
    return compiled


SHAPES = {
    "contiguous": (1, 4096 * 3072, 1),
    "rows": (4096, 3072, 1),
    "transposed": (4096, 3072, 4096),
}
"""Rows, columns and the step from column to column."""


def rel_l1_for(
    target: str, dtype: torch.dtype, layout: str, riders: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    columns = {"current_column": 1, "previous_column": 1}
    units = {
        "contiguous": {"rows": 1, "inner_rows": 1} | columns,
        "rows": columns,
        "transposed": {},
    }
    tile_rows, tile_columns = tile_shape(*SHAPES[layout], dtype)
    pointers = {
        "current_ptr": TYPES[dtype],
        "previous_ptr": TYPES[dtype],
        "scratch_ptr": "i32",
        "numbers_ptr": "fp64",
    }
    pointers |= {f"along_{i}_ptr": kind for i, kind in enumerate(riders)}
    absent = {f"along_{i}_ptr": None for i in range(len(riders), 4)}
    tile = {"TILE_ROWS": tile_rows, "TILE_COLUMNS": tile_columns}
    constants = {"PARTIALS": 1024} | absent | tile | units[layout]
    return compile_for(target, distance.rel_l1_kernel, pointers, constants, **options)


def fingerprint_for(target: str, dtype: torch.dtype, layout: str, **options: Any) -> dict[str, Any]:
    units = {
        "contiguous": {"rows": 1, "inner_rows": 1, "column_stride": 1},
        "rows": {"column_stride": 1},
        "transposed": {},
    }
    tile_rows, tile_columns = tile_shape(*SHAPES[layout], dtype)
    pointers = {
        "bits_ptr": f"i{8 * dtype.itemsize}",
        "scratch_ptr": "i32",
        "numbers_ptr": "fp64",
    }
    tile = {"TILE_ROWS": tile_rows, "TILE_COLUMNS": tile_columns}
    constants = {"PARTIALS": 1024} | tile | units[layout]
    return compile_for(target, contents.fingerprint_kernel, pointers, constants, **options)


def rel_l1_gate_for(target: str, dtype: torch.dtype, layout: str, **options: Any) -> dict[str, Any]:
    columns = {"current_column": 1, "previous_column": 1}
    units = {
        "contiguous": {"rows": 1, "inner_rows": 1} | columns,
        "rows": columns,
        "transposed": {},
    }
    tile_rows, tile_columns = tile_shape(*SHAPES[layout], dtype)
    pointers = {
        "current_ptr": TYPES[dtype],
        "previous_ptr": TYPES[dtype],
        "accumulated_ptr": "fp64",
        "scratch_ptr": "i32",
        "coefficients_ptr": "fp64",
        "verdict_ptr": "fp64",
    }
    tile = {"TILE_ROWS": tile_rows, "TILE_COLUMNS": tile_columns}
    constants = {"COEFFICIENTS": 5, "PARTIALS": 1024} | tile | units[layout]
    return compile_for(target, distance.rel_l1_gate_kernel, pointers, constants, **options)


def magnitude_stats_for(
    target: str, dtype: torch.dtype, column_stride: int, **options: Any
) -> dict[str, Any]:
    tile_tokens, tile_columns = tile_shape(4096, 3072, column_stride, dtype)
    pointers = {
        "residual_ptr": TYPES[dtype],
        "previous_ptr": TYPES[dtype],
        "scratch_ptr": "i32",
        "stats_ptr": "fp32",
    }
    constants = {"PARTIALS": 1024, "TILE_TOKENS": tile_tokens, "TILE_COLUMNS": tile_columns}
    if column_stride == 1:
        constants |= {"residual_column": 1, "previous_column": 1}
    return compile_for(target, magnitude.magnitude_stats_kernel, pointers, constants, **options)


def inner_products_for(
    target: str, dtype: str, count: int, integers: str = "i32", aligned: bool = True
) -> dict[str, Any]:
    # A tuple of pointers is one parameter, whose elements are named by their places in it.
    kernel = products.inner_products_kernel
    signature = {
        "residual_ptrs": ("*" + dtype,) * count,
        "partials_ptr": "*fp64",
        "size": integers,
        "TILE": "constexpr",
    }
    places = [*((0, place) for place in range(count)), (1,), (2,)]
    attributes = {place: [["tt.divisibility", 16]] for place in places if aligned}
    compiled: dict[str, Any] = triton.compile(
        ASTSource(kernel, signature, {"TILE": 1024}, attributes),
        target=TARGETS[target],
        options={"num_warps": WARPS, "enable_fp_fusion": False},
    ).asm
    return compiled


def machine_code(compiled: dict[str, Any]) -> bytes:
    code: bytes = compiled["cubin"] if "cubin" in compiled else compiled["hsaco"]
    return code


@EVERY_TARGET
@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_rel_l1_compiles(target: str, dtype: torch.dtype, layout: str) -> None:
    assert machine_code(rel_l1_for(target, dtype, layout)).startswith(b"\x7fELF")


@EVERY_TARGET
@pytest.mark.parametrize(
    "riders", [["fp32"], ["i64", "u1"], ["bf16", "fp16", "fp64"], ["u8", "i8", "i16", "i32"]]
)
def test_rel_l1_compiles_with_riders_of_any_dtype(target: str, riders: list[str]) -> None:
    compiled = rel_l1_for(target, torch.bfloat16, "contiguous", riders)
    assert machine_code(compiled).startswith(b"\x7fELF")


@ALL_TARGETS
def test_rel_l1_compiles_for_unaligned_strided_and_huge_tensors(target: str) -> None:
    compiled = rel_l1_for(target, torch.bfloat16, "transposed", integers="i64", aligned=False)
    assert machine_code(compiled).startswith(b"\x7fELF")


@EVERY_TARGET
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_fingerprint_compiles(target: str, dtype: torch.dtype, layout: str) -> None:
    assert machine_code(fingerprint_for(target, dtype, layout)).startswith(b"\x7fELF")


@ALL_TARGETS
def test_fingerprint_compiles_for_unaligned_strided_and_huge_tensors(target: str) -> None:
    compiled = fingerprint_for(target, torch.int16, "transposed", integers="i64", aligned=False)
    assert machine_code(compiled).startswith(b"\x7fELF")


@EVERY_TARGET
@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_rel_l1_gate_compiles(target: str, dtype: torch.dtype, layout: str) -> None:
    assert machine_code(rel_l1_gate_for(target, dtype, layout)).startswith(b"\x7fELF")


@ALL_TARGETS
def test_rel_l1_gate_compiles_for_unaligned_strided_and_huge_tensors(target: str) -> None:
    compiled = rel_l1_gate_for(target, torch.bfloat16, "transposed", integers="i64", aligned=False)
    assert machine_code(compiled).startswith(b"\x7fELF")


@EVERY_TARGET
@EVERY_DTYPE
def test_magnitude_stats_compile(target: str, dtype: torch.dtype) -> None:
    assert machine_code(magnitude_stats_for(target, dtype, 1)).startswith(b"\x7fELF")


@ALL_TARGETS
def test_magnitude_stats_compile_for_unaligned_strided_and_huge_tensors(target: str) -> None:
    compiled = magnitude_stats_for(target, torch.bfloat16, 3, integers="i64", aligned=False)
    assert machine_code(compiled).startswith(b"\x7fELF")


@EVERY_TARGET
@pytest.mark.parametrize("dtype", [*TYPES.values(), "fp64"])
def test_inner_products_compile(target: str, dtype: str) -> None:
    assert machine_code(inner_products_for(target, dtype, 6)).startswith(b"\x7fELF")


@ALL_TARGETS
def test_inner_products_compile_for_one_unaligned_huge_tensor(target: str) -> None:
    compiled = inner_products_for(target, "bf16", 1, integers="i64", aligned=False)
    assert machine_code(compiled).startswith(b"\x7fELF")


@ALL_TARGETS
def test_magnitude_gate_compiles(target: str) -> None:
    pointers = {"state_ptr": "fp64", "ratio_ptr": "fp64", "verdict_ptr": "fp64"}
    compiled = compile_for(target, magnitude.magnitude_gate_kernel, pointers, {}, warps=1)
    assert machine_code(compiled).startswith(b"\x7fELF")


@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
def test_rel_l1_gate_reads_sixteen_bytes_per_access(dtype: torch.dtype, layout: str) -> None:
    ptx = rel_l1_gate_for("sm_90", dtype, layout)["ptx"]
    assert ptx.count("ld.global.v4.b32") == 2
    assert "st.global.v4" not in ptx


@EVERY_DTYPE
@pytest.mark.parametrize("layout", ["contiguous", "rows"])
@pytest.mark.parametrize("riders", [[], ["fp32", "i64"]])
def test_rel_l1_reads_sixteen_bytes_per_access(
    dtype: torch.dtype, layout: str, riders: list[str]
) -> None:
    ptx = rel_l1_for("sm_90", dtype, layout, riders)["ptx"]
    assert ptx.count("ld.global.v4.b32") == 2
    assert "st.global.v4" not in ptx


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_fingerprint_reads_sixteen_bytes_per_access(dtype: torch.dtype) -> None:
    ptx = fingerprint_for("sm_90", dtype, "contiguous")["ptx"]
    assert re.findall(r"ld\.global\.v\S+", ptx) in (["ld.global.v4.b32"], ["ld.global.v2.b64"])


@EVERY_DTYPE
def test_magnitude_stats_read_sixteen_bytes_per_access(dtype: torch.dtype) -> None:
    assert magnitude_stats_for("sm_90", dtype, 1)["ptx"].count("ld.global.v4.b32") == 2


@pytest.mark.parametrize("compiled_for", [rel_l1_for, rel_l1_gate_for, fingerprint_for])
def test_the_last_program_is_found_by_an_integer_atomic_that_acquires_and_releases(
    compiled_for: Callable[..., dict[str, Any]],
) -> None:
    ptx = compiled_for("sm_90", torch.bfloat16, "contiguous")["ptx"]
    assert re.findall(r"\b(?:atom|red)\.\S+", ptx) == ["atom.global.gpu.acq_rel.add.u32"]


@pytest.mark.parametrize(
    "kernel",
    [distance.rel_l1_gate_kernel, magnitude.magnitude_gate_kernel],
    ids=lambda k: k.__name__,
)
def test_the_threshold_is_a_run_time_argument_in_double_precision(kernel: Any) -> None:
    (threshold,) = (p for p in kernel.params if p.name == "threshold")
    assert (threshold.annotation_type, threshold.is_constexpr) == ("fp64", False)
