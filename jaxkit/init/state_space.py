"""State spaces that start as causal linear attention, which copies and recalls from the outset."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.init.mimetic import partners
from jaxkit.init.rules import TreeInitializer, rules

__all__ = ["last_tap", "mimetic_ssm"]


def last_tap(
    key, shape: Sequence[int], dtype=None, out_sharding=None, *, layout: str = "t1c"
) -> Float[Array, "*shape"]:
    """Return a depthwise kernel ``(taps, 1, channels)``: 1 at the last tap, and 0 at the others.

    The identity, in a causal convolution. Nothing is random.

    Args:
      layout: names the dimensions: t (taps), 1, and any others; "c1t" as in PyTorch.

    Raises:
      ValueError: a kernel that is not depthwise, or that does not fit the layout.

    >>> last_tap(None, (3, 1, 2))[:, 0, 0].tolist()
    [0.0, 0.0, 1.0]
    """
    del key
    sizes = dict(zip(layout, shape, strict=False))
    if len(shape) != len(layout) or sizes.get("1", 1) != 1:
        raise ValueError(
            f"a depthwise kernel is due with the layout {layout!r}, and the shape {tuple(shape)} "
            "came; give the layout of the stored kernel"
        )
    last = (slice(None),) * layout.index("t") + (-1,)
    kernel = jnp.zeros(shape, dtype).at[last].set(1)
    return kernel if out_sharding is None else jax.sharding.reshard(kernel, out_sharding)


def _sizes(path: str, shape: Sequence[int], layout: str) -> dict[str, int]:
    if len(shape) != len(layout):
        raise ValueError(
            f"{path!r} has shape {tuple(shape)}, and the layout {layout!r} has {len(layout)} "
            "dimensions; give the layout of the stored kernel"
        )
    return dict(zip(layout, shape, strict=True))


def _turn(kernel: Array, have: str, want: str) -> Array:
    return kernel.transpose([have.index(letter) for letter in want])


def mimetic_ssm(
    horizon: float,
    *,
    a_log: tree.Where,
    dt_bias: tree.Where,
    dt: tree.Where,
    conv: tree.Where | None,
    conv_bias: tree.Where | None = None,
    b: tree.Where | None = None,
    c: tree.Where | None = None,
    dt_b_c: tree.Where | None = None,
    state: int | None = None,
    layout: str = "io",
    conv_layout: str = "t1c",
    noise: float = 0.1,
) -> TreeInitializer:
    """State spaces that start as causal linear attention: tokens read those that are like them.

    For ``h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t`` and ``y_t = C_t h_t`` with
    ``A = -exp(A_log)`` and ``Delta = softplus(W_dt x + dt_bias)``, the map from token j to i is
    ``C_i . prod(exp(Delta A)) B_j Delta_j``. Returns ``init(key, params) -> params`` that makes it
    ``C_i . B_j`` with C and B alike, so that it is largest where tokens are alike::

        A_log    = log(1 / horizon)            a token decays to 1/e after `horizon` steps
        W_dt     = 0,  dt_bias = log(e - 1)    Delta = softplus(dt_bias) = 1 for every input
        W_B      ~ N(0, 1 / fan_in),  W_C = W_B + noise * N(0, 1 / fan_in)
        conv     = the identity: 1 at the last tap, bias 0

    Every leaf of a kind is chosen by its own `where`: trees of state spaces differ, and nothing is
    guessed. B and C are columns of ``(fan_in, state)`` kernels; Mamba-1 stores them as the last
    ``2 * state`` columns of one kernel (Delta's low rank first), which is `dt_b_c`. Delta's weights
    are then the second factor of its low rank, and the first is left as it is, so that `params`
    must hold values (otherwise their shapes are enough). A layout names the dimensions of a stored
    kernel: i (inputs), o (outputs), t (taps), 1, c (channels), and l (layers that are stacked, each
    drawn on its own)::

        mimetic_ssm(512, a_log="**/A_log", dt="**/dt_proj/kernel", dt_bias="**/dt_proj/bias",
                    dt_b_c="**/x_proj/kernel", state=16, conv="**/conv1d/kernel")
        layout="io", conv_layout="t1c"    kernels as in flax, the default
        layout="oi", conv_layout="c1t"    weights as in PyTorch

    To change some layers alone, let the globs match those alone.

    Args:
      horizon: how many steps a state lasts; at least the length of the context.
      a_log: chooses log(-A), of any shape (per channel and state, or per head). No value tells it
        from A itself: see that the model takes its exponential.
      dt_bias: chooses the biases inside the softplus, not Delta itself.
      dt: chooses the weights inside the softplus.
      conv: chooses the depthwise kernels of the causal convolution; None where there is none.
      conv_bias: chooses their biases.
      b: chooses the kernels of B.
      c: chooses the kernels of C.
      dt_b_c: chooses kernels that hold both; in place of `b` and `c`.
      state: the size of the state, for `dt_b_c`.
      layout: that of the kernels of B and C, or of both, and of Delta's.
      conv_layout: that of the convolutions.
      noise: the standard deviation of ``W_C - W_B`` over that of ``W_B``.

    Raises:
      ValueError: a horizon that is not positive; neither or both of (b, c) and (dt_b_c, state);
        kernels of B and C that do not pair up or differ in shape; naming the path, a shape that
        does not fit its layout, or that other leaves of the module contradict: B with as many
        outputs as Delta has channels and as many inputs as A_log has states, a kernel for both
        without ``rank + 2 * state`` outputs (rank: the inputs of Delta's kernel), a convolution
        with other channels than its bias.
      TypeError: a legacy uint32 key.

    >>> params = {"A_log": jnp.zeros((6, 2)), "dt": jnp.ones((1, 6)), "dt_bias": jnp.zeros(6),
    ...           "x_proj": jnp.zeros((6, 5)), "conv": jnp.ones((4, 1, 6))}
    >>> init = mimetic_ssm(64, a_log="A_log", dt="dt", dt_bias="dt_bias", conv="conv",
    ...                    dt_b_c="x_proj", state=2)
    >>> new = init(jax.random.key(0), params)
    >>> float(jax.nn.softplus(new["dt_bias"])[0]), new["conv"][:, 0, 0].tolist()
    (1.0, [0.0, 0.0, 0.0, 1.0])

    Reference: Asher Trockman, Hrayr Harutyunyan, J. Zico Kolter, Sanjiv Kumar, Srinadh
    Bhojanapalli, "Mimetic Initialization Helps State Space Models Learn to Recall",
    arXiv 2410.11135. The ideas are the paper's; `horizon`, `noise` and the variance of ``W_B`` are
    our choice.
    """
    if horizon <= 0:
        raise ValueError(f"horizon={horizon}: a positive number of steps is due")
    separate = b is not None and c is not None and dt_b_c is None and state is None
    if not separate and (dt_b_c is None or state is None or b is not None or c is not None):
        raise ValueError("either b and c are due, or dt_b_c and state")
    for name, given, letters in (("layout", layout, "io"), ("conv_layout", conv_layout, "1ct")):
        if "".join(sorted(given)) not in (letters, "".join(sorted(letters + "l"))):
            raise ValueError(f"{name}={given!r}: the letters {letters!r} are due, and l if stacked")
    width = 0 if state is None else state
    order = "lio" if "l" in layout else "io"
    constant, zeros = jax.nn.initializers.constant, jax.nn.initializers.zeros
    taps = lambda key, shape, dtype: last_tap(key, shape, dtype, layout=conv_layout)
    pairs = [
        (a_log, constant(-math.log(horizon))),
        (dt_bias, constant(math.log(math.e - 1))),
        (dt, zeros),
    ]
    pairs += [(conv, taps)] if conv is not None else []
    pairs += [(conv_bias, zeros)] if conv_bias is not None else []
    plain = rules(*pairs)

    def tied(key, sizes: dict[str, int], outputs: int) -> tuple[Array, Array]:
        """Return the kernels of B and C of all layers, (inputs, outputs) or stacked."""

        def one(key):
            first, second = jax.random.split(key)
            draw = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            kernel = draw(first, (sizes["i"], outputs), jnp.float32)
            return kernel, kernel + noise * draw(second, kernel.shape, jnp.float32)

        return jax.vmap(one)(jax.random.split(key, sizes["l"])) if "l" in sizes else one(key)

    def check_conv(shapes, hits):
        biases = {} if conv_bias is None else partners(hits(conv), hits(conv_bias), "bias")
        for path in hits(conv):
            sizes = _sizes(path, shapes[path], conv_layout)
            bias = shapes[biases[path]][-1] if biases else sizes["c"]
            if sizes["1"] != 1 or sizes["c"] != bias:
                raise ValueError(
                    f"{path!r} has shape {tuple(shapes[path])}: a depthwise kernel of the layout "
                    f"{conv_layout!r} is due, with as many channels as its bias ({bias})"
                )

    def init(key: PRNGKeyArray, params: PyTree) -> PyTree:
        leaves = tree.flatten(params)
        hits = lambda where: list(tree.chosen(params, where))
        shapes = {path: jnp.shape(leaf) for path, leaf in leaves.items()}
        if conv is not None:
            check_conv(shapes, hits)
        new = tree.flatten(plain(key, params))
        keys = tree.flatten(tree.keys(key, params, "jaxkit.init.mimetic_ssm"))
        if dt_b_c is not None:
            for path, partner in partners(hits(dt_b_c), hits(dt), "Delta").items():
                leaf, sizes = new[path], _sizes(path, shapes[path], layout)
                rank = _sizes(partner, shapes[partner], layout)["i"]
                if sizes["o"] != rank + 2 * width:
                    raise ValueError(
                        f"{path!r} has shape {leaf.shape}, and {rank} + 2 * {width} outputs were "
                        f"due with the layout {layout!r}: {partner!r} has {rank} inputs"
                    )
                both = jnp.concatenate(tied(keys[path], sizes, width), axis=-1)
                kept = _turn(jnp.asarray(leaf), layout, order)[..., :rank]
                both = jnp.concatenate([kept, both.astype(leaf.dtype)], axis=-1)
                new[path] = _turn(both, order, layout)
        else:
            decays = partners(hits(b), hits(a_log), "A_log")
            biases = partners(hits(b), hits(dt_bias), "Delta's bias")
            for path, partner in partners(hits(b), hits(c), "C").items():
                if shapes[path] != shapes[partner]:
                    raise ValueError(
                        f"{path!r} is {shapes[path]} and {partner!r} {shapes[partner]}"
                    )
                sizes, a = _sizes(path, shapes[path], layout), shapes[decays[path]][-2:]
                channels = shapes[biases[path]][-1:]
                same = sorted(a) == sorted((sizes["i"], sizes["o"]))
                if same and (sizes["o"],) == channels != (sizes["i"],):
                    raise ValueError(
                        f"{path!r} has shape {shapes[path]}, of which the layout {layout!r} makes "
                        f"{sizes['i']} inputs and {sizes['o']} outputs, and {biases[path]!r} says "
                        f"that {sizes['o']} are the channels: give the layout of the stored kernel"
                    )
                for where, kernel in zip(
                    (path, partner), tied(keys[path], sizes, sizes["o"]), strict=True
                ):
                    new[where] = _turn(kernel, order, layout).astype(new[where].dtype)
        return tree.replace(params, new)

    return init
