"""Fixtures of the whole suite: where it runs (`pytest --device cuda`), in which precision, and from which seed."""

import os
import signal

import numpy as np
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the tests that use tensors: cpu, cuda, cuda:1")


def pytest_configure() -> None:
    # A shell's background job ignores interrupts, and hands that on to the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(params=[torch.float32, torch.float64], ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def needs(reason: str | None) -> None:
    """Skips a test that cannot run, for the reason; in CI, which installs all that tests need, it fails."""
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
