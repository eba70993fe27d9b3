"""What `trace.axes` says of random programs is true: it never ties or frees wrongly."""

import jax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxkit import trace
from tests.trace import programs

_SIZE = st.sampled_from(programs.SIZES)
_SHAPES = st.lists(st.lists(_SIZE, min_size=1, max_size=3), min_size=1, max_size=4)
_NUMBER = st.integers(0, 59)
_STEPS = st.lists(
    st.tuples(st.integers(0, len(programs.STEPS) - 1), _NUMBER, _NUMBER, _NUMBER),
    min_size=2,
    max_size=7,
)


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=120,
    suppress_health_check=list(HealthCheck),
)
@given(_SHAPES, _STEPS, st.integers(0, 2))
def test_every_axis_found_can_be_permuted(shapes, steps, keep):
    with jax.enable_x64(True):  # so that a sum in another order and a wrong axis differ widely
        apply_fn, params, args = programs.build(shapes, steps, keep)
        axes = trace.axes(apply_fn, params, *args)
        try:
            trace.check(apply_fn, params, axes, args, tol=1e-8)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
