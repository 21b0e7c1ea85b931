"""Input of the tests of verify."""

import pytest
import torch


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(6, 5, device=device)
