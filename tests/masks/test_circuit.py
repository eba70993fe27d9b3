"""Probabilistic circuits: likelihoods, flows, and what pruning and growing do to both."""

from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.masks import circuit

PARENTS = (-1, 0, 0, 1, 1, 2)  # a tree of six bits
STATES = 3
EVERY = jnp.array(list(product((0, 1), repeat=6)))
PARAMS = circuit.init(jax.random.key(0), PARENTS, STATES, 2)
DATA = jax.random.bernoulli(jax.random.key(1), 0.4, (30, 6)).astype(int).at[:, 5].set(1)

log_probs = jax.jit(jax.vmap(lambda p, x: circuit.log_prob(p, PARENTS, x), (None, 0)))
flows = jax.jit(lambda p, x: circuit.flows(p, PARENTS, x))
prune, em = jax.jit(circuit.prune), jax.jit(circuit.em)


def total(params):
    return float(jnp.exp(log_probs(params, EVERY)).sum())


def ll(params):
    return float(log_probs(params, DATA).mean())


def edges(params):
    return sum(int(jnp.isfinite(e).sum()) for e in params["edges"])


def test_likelihoods_by_summing_over_all_latent_states():
    theta = [np.exp(np.asarray(e, np.float64)) for e in PARAMS["edges"]]
    beta = [np.exp(np.asarray(b, np.float64)) for b in PARAMS["leaves"]]
    due = np.zeros(64)
    for z in product(range(STATES), repeat=6):
        prior = np.prod([theta[v][0 if p < 0 else z[p], z[v]] for v, p in enumerate(PARENTS)])
        for i, x in enumerate(np.asarray(EVERY)):
            due[i] += prior * np.prod([beta[v][z[v], x[v]] for v in range(6)])
    np.testing.assert_allclose(np.exp(log_probs(PARAMS, EVERY)), due, rtol=1e-5)
    np.testing.assert_allclose(due.sum(), 1, rtol=1e-6)


def test_a_chain_is_a_hidden_markov_model():
    """Scores of hmmlearn 0.3.3, CategoricalHMM, on the same parameters and data."""
    rng = np.random.default_rng(0)
    start, move, emit = (rng.dirichlet(np.ones(n), m) for n, m in ((3, 1), (3, 3), (4, 3)))
    x = rng.integers(0, 4, (3, 8))
    move = np.log(move).astype(np.float32)
    chain = {
        "edges": (np.log(start).astype(np.float32), *[move] * 7),
        "leaves": (np.log(emit).astype(np.float32),) * 8,
    }
    chain = jax.tree.map(jnp.asarray, chain)
    run = jax.vmap(lambda row: circuit.log_prob(chain, tuple(range(-1, 7)), row))
    due = [-15.014074708495661, -13.17439900984725, -14.009139719130198]
    np.testing.assert_allclose(run(x), due, rtol=1e-6)


def test_flows_are_conserved():
    found = flows(PARAMS, DATA)
    np.testing.assert_allclose(found["edges"][0].sum(), len(DATA), rtol=1e-5)
    for v, p in enumerate(PARENTS):
        into = found["edges"][v].sum(0)  # of the states of v
        np.testing.assert_allclose(found["leaves"][v].sum(1), into, rtol=1e-4)
        if v:
            parent = found["edges"][p].sum(0)
            np.testing.assert_allclose(found["edges"][v].sum(1), parent, rtol=1e-4)


def test_without_an_edge_the_probability_loses_its_flow():
    each = jax.jit(jax.vmap(lambda x: circuit.flows(PARAMS, PARENTS, x[None])))(EVERY)
    base = log_probs(PARAMS, EVERY)
    for v, i, j in ((0, 0, 1), (2, 1, 0), (4, 2, 2), (5, 0, 2)):
        cut = list(PARAMS["edges"])
        cut[v] = cut[v].at[i, j].set(-jnp.inf)
        ratio = jnp.exp(log_probs(PARAMS | {"edges": tuple(cut)}, EVERY) - base)
        np.testing.assert_allclose(ratio, 1 - each["edges"][v][:, i, j], rtol=1e-5, atol=1e-6)


def test_em_never_lowers_the_likelihood_and_keeps_the_distribution():
    lls, params = [ll(PARAMS)], PARAMS
    for _ in range(15):
        params = em(params, flows(params, DATA))
        lls.append(ll(params))
    assert all(b >= a - 1e-6 for a, b in pairwise(lls))
    assert lls[-1] > lls[0] + 0.1
    np.testing.assert_allclose(total(params), 1, rtol=1e-5)
    assert float(jnp.exp(params["leaves"][5][:, 0]).max()) < 1e-6  # the last bit is always set
    soft = em(PARAMS, flows(PARAMS, DATA), pseudocount=0.5, inertia=0.9)
    np.testing.assert_allclose(total(soft), 1, rtol=1e-5)
    counts = flows(PARAMS, DATA)["leaves"][3] + 0.5
    due = 0.9 * jnp.exp(PARAMS["leaves"][3]) + 0.1 * counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(jnp.exp(soft["leaves"][3]), due, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        em(PARAMS, flows(PARAMS, DATA), inertia=1.0),
        PARAMS,
    )


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75])
def test_pruning_loses_no_more_than_its_bound(fraction):
    params = PARAMS
    for _ in range(3):
        params = em(params, flows(params, DATA))
    sparse = prune(params, flows(params, DATA), fraction)
    gone = tuple(~jnp.isfinite(e) for e in sparse["edges"])
    each = jax.jit(jax.vmap(lambda x: circuit.flows(params, PARENTS, x[None])["edges"]))(DATA)
    lost = sum((f * g).sum((1, 2)) for f, g in zip(each, gone, strict=True))
    np.testing.assert_allclose(total(sparse), 1, rtol=1e-5)
    for e in sparse["edges"]:
        np.testing.assert_allclose(jnp.exp(e).sum(1), 1, rtol=1e-5)
    count = STATES + 5 * STATES**2
    assert edges(sparse) == edges(params) - sum(int(g.sum()) for g in gone)
    assert edges(sparse) >= count - int(fraction * count)
    if fraction == 0.1:
        assert edges(sparse) == count - 4
        assert (lost < 1).all()
        assert ll(params) - ll(sparse) <= -float(jnp.log(1 - lost).mean()) + 1e-6
        scores = jnp.concatenate([f.ravel() for f in flows(params, DATA)["edges"]])
        cut = jnp.concatenate([g.ravel() for g in gone])
        assert scores[cut].max() <= scores[~cut].min()


def test_pruned_edges_stay_pruned_and_every_node_keeps_one():
    params = prune(PARAMS, flows(PARAMS, DATA), 1.0)
    assert edges(params) == 1 + 5 * STATES
    kept = [int(jnp.isfinite(e).argmax()) for e in params["edges"]]
    assert kept == [0] * 6  # the first
    again = prune(params, flows(params, DATA), 0.5)  # nothing is left to prune
    assert edges(again) == edges(params)
    trained = em(params, flows(params, DATA), pseudocount=0.1)
    assert edges(trained) == edges(params)
    assert all(jnp.isfinite(f).all() for f in jax.tree.leaves(flows(params, DATA)))
    assert np.isfinite(ll(trained))


def test_compact_circuits_are_smaller_and_the_same():
    sparse = prune(PARAMS, flows(PARAMS, DATA), 0.75)
    small = circuit.compact(sparse, PARENTS)
    sizes = [sum(x.size for x in jax.tree.leaves(p)) for p in (sparse, small)]
    assert sizes[1] < sizes[0]
    got = jax.vmap(lambda x: circuit.log_prob(small, PARENTS, x))(EVERY)
    np.testing.assert_allclose(got, log_probs(sparse, EVERY), rtol=1e-5)


def test_growing_without_noise_changes_no_likelihood():
    sparse = prune(PARAMS, flows(PARAMS, DATA), 0.4)
    for params in (PARAMS, sparse):
        big = circuit.grow(jax.random.key(2), params, std=0.0)
        assert edges(big) == 4 * edges(params) - 2 * STATES * (params is PARAMS) - (
            2 * int(jnp.isfinite(params["edges"][0]).sum()) * (params is sparse)
        )
        np.testing.assert_allclose(log_probs(big, EVERY), log_probs(params, EVERY), atol=1e-5)
    noisy = circuit.grow(jax.random.key(2), sparse)
    np.testing.assert_allclose(total(noisy), 1, rtol=1e-5)
    assert jnp.abs(log_probs(noisy, EVERY) - log_probs(sparse, EVERY)).max() > 1e-3


def test_what_has_no_probability():
    never = PARAMS | {"leaves": tuple(jnp.log(jnp.eye(2)[jnp.array([0, 0, 0])]) for _ in PARENTS)}
    assert log_probs(never, EVERY)[0] == pytest.approx(0, abs=1e-5)
    assert (log_probs(never, EVERY)[1:] == -jnp.inf).all()
    found = flows(never, EVERY)
    assert all(jnp.isfinite(f).all() for f in jax.tree.leaves(found))
    np.testing.assert_allclose(found["edges"][0].sum(), 1, rtol=1e-5)
    for category in (2, -1):
        outside = jnp.zeros(6, int).at[3].set(category)
        assert circuit.log_prob(PARAMS, PARENTS, outside) == -jnp.inf


def test_bad_input():
    for parents in ((), (0,), (-1, 1), (-1, -1)):
        with pytest.raises(ValueError, match="parents: -1, then"):
            circuit.init(jax.random.key(0), parents, 2, 2)
    with pytest.raises(ValueError, match="6 parents, 6 latent variables, x"):
        circuit.log_prob(PARAMS, PARENTS, jnp.zeros(5, int))
    with pytest.raises(ValueError, match=r"fraction=1\.5"):
        circuit.prune(PARAMS, PARAMS, 1.5)
    with pytest.raises(ValueError, match="the flows does not fit"):
        circuit.em(PARAMS, PARAMS["edges"])
    dead = PARAMS["edges"][:2] + (PARAMS["edges"][2].at[1].set(-jnp.inf),) + PARAMS["edges"][3:]
    with pytest.raises(ValueError, match="'edges/2': a node without edges"):
        circuit.prune(PARAMS | {"edges": dead}, PARAMS, 0.5)
    with pytest.raises(TypeError, match="typed key"):
        circuit.grow(jax.random.PRNGKey(0), PARAMS)


@pytest.mark.slow
def test_growing_helps_em_on_if_the_copies_differ():
    """A chain of 8 steps and 4 symbols, from 6 states, learned with 3, then doubled."""
    steps, symbols = 8, 4
    parents = tuple(range(-1, steps - 1))
    teacher = jax.tree.map(
        lambda x: jax.nn.log_softmax(4 * x), circuit.init(jax.random.key(9), parents, 6, symbols)
    )

    def sample(key):
        first, rest = key, []
        state = 0
        for edge, leaf in zip(teacher["edges"], teacher["leaves"], strict=True):
            first, one, two = jax.random.split(first, 3)
            state = jax.random.categorical(one, edge[state])
            rest.append(jax.random.categorical(two, leaf[state]))
        return jnp.stack(rest)

    data = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(10), 500))

    @jax.jit
    def fit(params):
        def step(params, _):
            value = jax.vmap(lambda x: circuit.log_prob(params, parents, x))(data).mean()
            return circuit.em(params, circuit.flows(params, parents, data)), value

        return jax.lax.scan(step, params, None, length=100)

    params = circuit.init(jax.random.key(0), parents, 3, symbols)
    for _ in range(3):
        params, lls = fit(params)
    before = float(lls[-1])
    further = float(fit(params)[1][-1])
    big = circuit.grow(jax.random.key(1), params)
    grown = float(fit(big)[1][-1])
    equal = float(fit(circuit.grow(jax.random.key(1), params, std=0.0))[1][-1])
    print("before", before, "further", further, "equal copies", equal, "grown", grown)
    assert further - before < 0.01
    assert abs(equal - further) < 0.005
    assert grown - before > 0.1
