import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import deep_signal, signal_figure
from jaxkit import init
from tests.runs import all_rows

SMALL = replace(
    deep_signal.Settings(), train=64, test=40, seeds=2, depth=8, width=8, steps=4, average=2,
    batch=8, lr=(1e-3, 3e-3), probe=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return json.loads(json.dumps(all_rows(deep_signal.run(SMALL, None))))


def test_every_network_is_probed_and_trained(rows):
    found = deep_signal.gather(rows)
    assert list(found) == [*deep_signal.DIES, deep_signal.CHAOTIC, *deep_signal.TRAINS]
    for one in found.values():
        assert len(one.advice.rows) == 8  # kernels, in order of execution
        assert one.advice.rows[0].path == "first/kernel"
        assert one.loss.shape == (2, 2) and one.test.shape == (2,)
        assert one.lr in SMALL.lr
    assert len(deep_signal.claims(SMALL, rows)) == 4
    assert isinstance(deep_signal.plot(SMALL, rows), Figure)


def test_networks_start_as_their_papers_say():
    settings = replace(SMALL, depth=10, width=16)
    nets = {net.name: net for net in deep_signal.networks(settings, 16, 10)}
    x = jax.random.uniform(jax.random.key(0), (32, 16))
    start = {name: net.start(jax.random.key(1), x) for name, net in nets.items()}
    blocks = start["residual, LSUV"]["blocks"]
    assert blocks["up"]["kernel"].shape == (4, 16, 16)
    eye = jnp.broadcast_to(jnp.eye(16), (8, 16, 16))
    np.testing.assert_array_equal(start["ReLU, ZerO"]["hidden"]["kernel"], eye)
    np.testing.assert_array_equal(start["residual, ReZero"]["blocks"]["alpha"], 0)
    edge = init.edge_of_chaos(jnp.tanh, settings.sigma_b).sigma_w
    w = start["tanh, edge of chaos"]["hidden"]["kernel"]
    np.testing.assert_allclose(w @ w.swapaxes(1, 2), edge**2 * eye, atol=1e-5)
    assert (w[0] != w[1]).any()
    head = lambda params: x @ params["first"]["kernel"] @ params["head"]["kernel"]
    for name, error in (("residual, ReZero", 1e-5), ("residual, IDInit", 1e-4)):
        out = nets[name].apply(start[name], x)
        np.testing.assert_allclose(out, head(start[name]), atol=error)  # blocks are the identity
    signals = init.signals(nets["residual, LSUV"].apply, start["residual, LSUV"], x).layers
    for name in ("up", "down"):
        out = signals[f"blocks/{name}/kernel"].output
        assert ((out > 0.98) & (out < 2)).all()  # unit variance, and a mean


def test_rates_are_those_of_the_probe():
    """Kernels that are multiples of the identity: every layer multiplies by the same number."""
    apply = deep_signal.chain(lambda x: x)
    eye = jnp.broadcast_to(0.5 * jnp.eye(4), (20, 4, 4))
    params = {
        "first": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
        "hidden": {"kernel": eye, "bias": jnp.zeros((20, 4))},
        "head": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)},
    }
    advice = init.advise(apply, params, jax.random.normal(jax.random.key(0), (16, 4)))
    advice = signal_figure.unpacked(json.loads(json.dumps(signal_figure.packed(advice))))
    assert deep_signal.rate(advice, "output") == pytest.approx(0.5, rel=1e-3)
    assert deep_signal.rate(advice, "backward") == pytest.approx(0.5, rel=1e-3)
    # what hidden/kernel[i] reads is 2^-i: below 1e-4 after 14 layers
    assert deep_signal.named(advice)[0] == "hidden/kernel[13]"


def test_claims_can_hold_and_fail(rows):
    wide = deep_signal.theory(SMALL)
    layers = np.arange(40)

    def made_up(name, good, rates, leaf):
        field, rate = wide.get(name, ("output", 1.0))
        sign = 1 if field == "output" else -1
        path = "hidden" if name not in ("residual, He",) else "blocks/up"
        columns = {
            "path": [f"{path}/kernel[{i}]" for i in layers],
            "output": [1.0] * 40, "backward": [1.0] * 40, "apart": [0.5] * 40, "dead": [0.0] * 40,
        }  # fmt: skip
        columns[field] = ((rate * rates) ** (sign * layers)).tolist()
        verdicts = [["forward-dies", leaf, ""]] if leaf else []
        probe = {"net": name, "advice": columns | {"verdicts": verdicts}}
        curves = [
            {"net": name, "lr": lr, "loss": [[loss, loss]] * 3, "train": [1, 1], "test": [a, a]}
            for lr, loss, a in ((1e-3, 1.0, 0.3), (3e-3, 0.5, 0.9 if good else 0.1))
        ]
        return [probe, *curves]

    names = (*deep_signal.DIES, deep_signal.CHAOTIC, *deep_signal.TRAINS)
    good, dies = deep_signal.TRAINS, deep_signal.DIES
    true = [row for n in names for row in made_up(n, n in good, 1.02, "a" if n in dies else "")]
    assert [c.holds for c in deep_signal.claims(SMALL, true)] == [True] * 4
    false = [row for n in names for row in made_up(n, n not in good, 1.1, "a" * (n in good))]
    assert [c.holds for c in deep_signal.claims(SMALL, false)] == [False] * 4


def test_signal_figure():
    apply = lambda params, x: x @ params["a"] @ params["b"]
    params = {"a": jnp.eye(3), "b": 1e-6 * jnp.eye(3)}
    advice = init.advise(apply, params, jax.random.normal(jax.random.key(0), (16, 3)))
    figure = signal_figure.signal_figure({"one": advice, "another": advice})
    assert len(figure.axes) == 4
    assert all(axes.get_title(loc="left") or axes.get_title() for axes in figure.axes)


def test_settings_that_do_not_fit():
    for change, match in (
        ({"depth": 7}, "depth=7: an even number"),
        ({"steps": 5}, "steps=5 is no multiple"),
        ({"probe": 65}, "probe=65: 2 to train=64"),
    ):
        with pytest.raises(ValueError, match=match):
            deep_signal.run(replace(SMALL, **change), None)
