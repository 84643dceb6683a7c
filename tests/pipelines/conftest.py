"""What the tests of pipelines share: what is compiled."""

from collections.abc import Iterator

import pytest
import torch

SHARING = (
    "test_chunks.py",
    "test_enable_pipeline.py",
    "test_image_to_image.py",
    "test_latents_unlike_predictions.py",
    "test_plans_of_pipelines.py",
    "test_schedules.py",
    "test_step_callbacks.py",
)
"""Files whose tests compile the same models with the same flags over and over. State lies with the
models, of which each test has its own."""


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
