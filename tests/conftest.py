"""Every test sees eight host devices, and as many threads as it has a right to."""

import itertools
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("MPLBACKEND", "Agg")

MAPS = Path("/proc/self/maps")  # Linux gives a process 65530 of them
finished = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs():
    """Drop what was compiled, before a process that keeps it all runs out of memory maps."""
    yield
    if next(finished) % 50 == 0 and MAPS.exists() and len(MAPS.read_bytes().splitlines()) > 25_000:
        import jax

        jax.clear_caches()
