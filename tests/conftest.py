"""What every test gets: no network, its own compile cache, a fresh Dynamo, a fixed thread count.

The environment is set on import, before any test module can import torch or the hub client.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

# Artefacts of an earlier run must not vouch for this one. A folder set by the caller is kept.
_own_compile_cache = None
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _own_compile_cache = tempfile.mkdtemp(prefix="omni-cache-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _own_compile_cache

# The first example of a compiled function pays for its compilation.
hypothesis.settings.register_profile("omni-cache", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("omni-cache")


def pytest_configure(config: pytest.Config) -> None:
    # Reductions over a fixed number of threads: bit-exact comparisons hold within one run.
    import torch

    # Workers of pytest-xdist share the cores, so each keeps to one.
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if is_worker else min(4, torch.get_num_threads()))


def pytest_unconfigure(config: pytest.Config) -> None:
    if _own_compile_cache is not None:
        shutil.rmtree(_own_compile_cache, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="run what repeats a test for another class or setting",
    )


# These files look at the same captured models, which take long to capture.
SHARING_CAPTURES = ("test_graphs.py", "test_models.py", "test_split.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("exhaustive") and not config.getoption("--exhaustive"):
            item.add_marker(pytest.mark.skip(reason="only with --exhaustive"))
        # A worker of pytest-xdist takes whole files, so that fixtures are made once.
        name = "captures" if item.path.name in SHARING_CAPTURES else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))


# State lies with the models, of which each test has its own; what is compiled may be shared.
SHARING_COMPILED = (
    "test_chunks.py",
    "test_constants.py",
    "test_enable_pipeline.py",
    "test_image_to_image.py",
    "test_latents_unlike_predictions.py",
    "test_plans_of_pipelines.py",
    "test_schedules.py",
    "test_second_generation.py",
    "test_step_callbacks.py",
)
"""Files whose tests compile the same models with the same flags over and over."""


@pytest.fixture(scope="module", autouse=True)
def _shared_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile once for all tests of such a file, however many flags they compile with."""
    if request.path.name not in SHARING_COMPILED:
        yield
        return
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=256):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _fresh_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test sees another's compiled code or recompile count, but in such a file."""
    yield
    if request.path.name not in SHARING_COMPILED and "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
