"""Bundles for the tests of the vLLM plugin."""

from pathlib import Path

import pytest

import treadle
from treadle.routing.embedder import StaticEmbedder

from vllm_plugin.engines import ADAPTERS, write_bundle


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, embedder: StaticEmbedder) -> Path:
    """A bundle of three unequal adapters."""
    return write_bundle(tmp_path_factory.mktemp("small"), embedder, ADAPTERS)


@pytest.fixture(scope="session")
def embedded(small: Path) -> treadle.Engine:
    """The engine that vLLM must agree with, on the bundle of unequal adapters."""
    return treadle.load(small, device="cpu", dtype="float32")
