"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    """The same random numbers in every run, whatever ran before."""
    torch.manual_seed(0)
