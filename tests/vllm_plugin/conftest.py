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
def equal(tmp_path_factory: pytest.TempPathFactory, embedder: StaticEmbedder) -> Path:
    """A bundle of three adapters of equal ranks and targets, which every combine allows."""
    same = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    return write_bundle(tmp_path_factory.mktemp("equal"), embedder, dict.fromkeys(ADAPTERS, same))


@pytest.fixture(scope="session")
def embedded(small: Path) -> treadle.engine.engine.Engine:
    """The engine that vLLM must agree with, on the bundle of unequal adapters."""
    return treadle.load(small, device="cpu", dtype="float32")
