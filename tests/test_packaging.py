"""What gets installed: the wheel, the entry points, the cost of an import, the layering."""

import ast
import configparser
import json
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import omni_cache

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_AS = {
    "omni_cache": "omni_cache",
    "passes": "omni_cache/passes",
    "kernels": "omni_cache/kernels",
}
IMPORTED_WHEN_USED = {"diffusers", "transformers", "cache_dit", "matplotlib", "skimage"}


def sources(folder: str) -> Iterator[Path]:
    for path in (ROOT / folder).rglob("*"):
        if path.is_file() and not any(
            part == "__pycache__" or part.startswith(".") for part in path.relative_to(ROOT).parts
        ):
            yield path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel built offline from a copy of the sources, so that no stale build/ leaks into it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in INSTALLED_AS:
        shutil.copytree(ROOT / folder, tree / folder)
    build = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    (path,) = (tree / "dist").iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    top = {PurePosixPath(name).parts[0] for name in wheel.namelist()}
    assert top == {"omni_cache", f"omni_cache-{omni_cache.__version__}.dist-info"}


def test_wheel_holds_exactly_the_source_folders(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, installed in INSTALLED_AS.items()
        for path in sources(folder)
    }
    assert {
        "omni_cache/py.typed",
        "omni_cache/passes/__init__.py",
        "omni_cache/kernels/__init__.py",
    } <= expected
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_wheel_carries_licence_and_entry_points(wheel: zipfile.ZipFile) -> None:
    info = f"omni_cache-{omni_cache.__version__}.dist-info"
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(entry_points["console_scripts"]) == {"omni-cache": "omni_cache.cli:app"}
    assert dict(entry_points["torch_dynamo_backends"]) == {
        "omni_cache": "omni_cache.backend:omni_cache_backend"
    }


def test_torch_knows_the_backend_by_name() -> None:
    import torch._dynamo

    assert "omni_cache" in torch._dynamo.list_backends()


def in_fresh_interpreter(program: str) -> str:
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_takes_at_most_300_ms_beyond_torch() -> None:
    program = """
import time, torch
start = time.perf_counter()
import omni_cache
print(time.perf_counter() - start)
"""
    seconds = statistics.median(float(in_fresh_interpreter(program)) for _ in range(3))
    assert seconds <= 0.3


def test_public_names_leave_heavy_packages_unimported() -> None:
    program = """
import json, sys, omni_cache
for name in getattr(omni_cache, "__all__", ()):
    getattr(omni_cache, name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    imported = set(json.loads(in_fresh_interpreter(program)))
    assert "omni_cache" in imported
    assert not imported & IMPORTED_WHEN_USED


def test_bare_kernels_import_from_the_checkout_does_no_harm() -> None:
    """With the checkout on sys.path, the `kernels` that diffusers looks for and imports is ours.

    Operators register once per process, so kernels/__init__.py imports its modules by their full
    name, `omni_cache.kernels...`: a second copy of the package then shares the first one's modules.
    """
    program = """
import pkgutil, sys
import kernels
import omni_cache.kernels
assert kernels is not omni_cache.kernels
for module in pkgutil.iter_modules(kernels.__path__):
    __import__(f"omni_cache.kernels.{module.name}")
"""
    in_fresh_interpreter(program)


def imported_modules(path: Path, package: str) -> Iterator[str]:
    """The absolute names a module of `package` imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = (anchor if node.level else []) + ([node.module] if node.module else [])
            # `from omni_cache import passes` names a module in its second half.
            yield from (".".join([*parts, alias.name]) for alias in node.names)


@pytest.mark.parametrize(
    ("folder", "allowed"), [("passes", {"torch"}), ("kernels", {"torch", "triton"})]
)
def test_lower_libraries_import_nothing_else(folder: str, allowed: set[str]) -> None:
    strangers = []
    for path in sources(folder):
        if path.suffix != ".py":
            continue
        inner = path.parent.relative_to(ROOT / folder).parts
        package = ".".join(["omni_cache", folder, *inner])
        strangers += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in imported_modules(path, package)
            if name.partition(".")[0] not in sys.stdlib_module_names | allowed
            and not name.startswith(f"omni_cache.{folder}.")
        ]
    assert strangers == []
