"""What every test may use."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from tiny_models import make_tiny_llama, make_tiny_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def _same_draws_every_time():
    """A test that draws without a seed of its own passes always or never."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    """The factory `make_tiny_llama`."""
    return make_tiny_llama


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return make_tiny_tokenizer()
