"""Every test sees eight host devices, and as many threads as it has a right to."""

import itertools
import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("MPLBACKEND", "Agg")

finished = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs():
    """Drop what was compiled now and then: a process that keeps it all runs out of memory maps."""
    yield
    if next(finished) % 100 == 0:
        import jax

        jax.clear_caches()
