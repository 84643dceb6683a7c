"""What the tests of the runtime share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Run a test as pipelines run their models."""
    with torch.no_grad():
        yield
