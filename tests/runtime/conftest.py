"""What the tests of the runtime share."""

from collections.abc import Iterator

import pytest
import torch

SHARING = (
    "test_constants.py",
    "test_second_generation.py",
)
"""Files whose tests compile the same models with the same flags over and over. State lies with the
models, of which each test has its own."""


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Run a test as pipelines run their models."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", autouse=True)
def _shared_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile once for all tests of such a file, however many flags they compile with."""
    limit = 256 if request.path.name in SHARING else torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=limit):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _fresh_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """As everywhere, but in such a file."""
    yield
    if request.path.name not in SHARING:
        torch._dynamo.reset()
