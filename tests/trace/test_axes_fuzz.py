"""What `trace.axes` says of random programs is true: it never ties or frees wrongly."""

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxkit import trace
from tests.trace import programs

_SIZE = st.sampled_from(programs.SIZES)
_SHAPES = st.lists(st.lists(_SIZE, min_size=1, max_size=3), min_size=1, max_size=4)
_NUMBER = st.integers(0, 59)
_STEP = st.tuples(st.integers(0, len(programs.STEPS) - 1), _NUMBER, _NUMBER, _NUMBER)


@pytest.mark.parametrize("kind", range(len(programs.STEPS)), ids=programs.NAMES)
@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=12,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    shapes=_SHAPES,
    before=st.lists(_STEP, max_size=2),
    chosen=st.tuples(_NUMBER, _NUMBER, _NUMBER),
    after=st.lists(_STEP, max_size=3),
    keep=st.integers(0, 2),
)
def test_every_axis_found_in_a_random_program_can_be_permuted(
    kind, shapes, before, chosen, after, keep
):
    with jax.enable_x64(True):  # so that a sum in another order and a wrong axis differ widely
        steps = [*before, (kind, *chosen), *after]
        apply_fn, params, args = programs.build(shapes, steps, keep)
        axes = trace.axes(apply_fn, params, *args)
        try:
            trace.check(apply_fn, params, axes, args, tol=1e-8)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
