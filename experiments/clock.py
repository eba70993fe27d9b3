"""How long a call takes."""

import time
from collections.abc import Callable
from typing import Any

import jax


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that a call takes, and those of all processors."""
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - start, time.process_time() - cpu
