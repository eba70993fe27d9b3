"""The zoo in Haiku: parameters are named by "mlp/~/linear_0" and the like."""

import haiku as hk
import jax

from tests.zoo import dense, recurrent
from tests.zoo.model import batch, randomize


def _built(forward, *args):
    transformed = hk.without_apply_rng(hk.transform(forward))
    shapes = jax.eval_shape(transformed.init, jax.random.key(0), *args)
    return transformed.apply, randomize(shapes), args


def _mlp(h1=5, h2=7):
    return _built(lambda x: hk.nets.MLP([h1, h2, 2])(x), batch(4, 3))


MLP = dense.MLP._replace(name="haiku_mlp", build=_mlp)


def _lstm(h0=5, h1=7):
    def forward(x):
        core = hk.DeepRNN([hk.LSTM(h0), hk.LSTM(h1)])
        y, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return hk.Linear(2)(y[:, -1])

    return _built(forward, batch(2, 6, 3))


LSTM = recurrent.LSTM._replace(name="haiku_lstm", build=_lstm)


MODELS = (MLP, LSTM)
