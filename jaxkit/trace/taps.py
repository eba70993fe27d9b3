"""The inputs and outputs of the operation that each leaf feeds, in any apply function.

`taps` reads them, `replay` replaces the operation. Both trace ``apply_fn(params, *args)`` to a
jaxpr and run it again with the same primitives; they work under jit, vmap and grad, and for any
front end: flax (close over rng names and static arguments), NNX (``nnx.split``/``nnx.merge``),
Equinox (``eqx.partition``/``eqx.combine``), Haiku, plain functions.

**The operation of a leaf** is a contraction (dot_general, conv_general_dilated,
ragged_dot_general) or a lookup (gather, dynamic_slice at an index that depends on the input) that
the leaf goes into, or the add, sub, mul or div in which it meets an activation (biases, gains). On
the way the leaf may be cast, transposed, reshaped, sliced, masked, normalized, combined with other
leaves and constants. What depends on an argument is an activation, and so is what comes out of an
operation. (Close over masks: as arguments they are activations, and the product with the mask is
the operation.)

Under jit the output is that of `apply_fn` bit for bit, as far as the compiler fuses alike. Run
eagerly, functions jitted inside that hold an operation run equation by equation.

Operations are found inside jit, remat, scan, cond, while, custom_jvp and custom_vjp. A function
with a custom derivative is left whole where no chosen leaf has its operation inside; where one
has, the function's body is run and differentiated instead. What cannot be followed (shard_map, a
concatenation with an activation, a callback) is an error that names the primitive and the line.
"""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Mapping

from jaxtyping import PyTree

from jaxkit import tree
from jaxkit.trace import _jaxpr, _uses, _walk
from jaxkit.trace._op import Op
from jaxkit.trace._walk import Tap

__all__ = ["Op", "Tap", "replay", "taps"]


def taps(
    apply_fn: Callable[..., PyTree], where: tree.Where = None
) -> Callable[..., tuple[PyTree, "OrderedDict[str, Tap]"]]:
    """Return ``fn(params, *args) -> (apply_fn(params, *args), {path: Tap})``.

    For a dense leaf W: ``Tap.input = x`` and ``Tap.output = x W``. The dict is in order of
    execution, under jit too. It costs one forward pass, and the memory of the taps in use. Every
    call traces apply_fn anew: jit what you call in a loop.

    Args:
      apply_fn: ``apply_fn(params, *args)``; every argument is traced, so close over static ones and
        over modules; rng keys and model state (BatchNorm) are arguments like others.
      where: the leaves to tap. Chosen by name, callable or tree, a leaf without an operation is an
        error; by default (the weights) it is absent.

    Returns:
      A pure function. An operation inside cond or while is not tapped, as it may not run.

    Raises:
      ValueError: (when called) a chosen leaf is never read, feeds no operation, or feeds one that
        cannot be tapped; all such leaves and the reasons are listed.
      TypeError: a leaf of params or of an argument that is no array.

    >>> import jax.numpy as jnp
    >>> def apply_fn(params, x):
    ...     h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    ...     return h @ params["readout"]["kernel"]
    >>> params = {"readout": {"kernel": jnp.ones((3, 1))},
    ...           "hidden": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    >>> output, tapped = taps(apply_fn)(params, jnp.ones((5, 2)))
    >>> for path, tap in tapped.items():
    ...     print(path, tap.primitive, tap.input.shape, tap.output.shape)
    hidden/kernel dot_general (5, 2) (5, 3)
    readout/kernel dot_general (5, 3) (5, 1)
    """

    def tapped(params: PyTree, *args: PyTree):
        traced = _jaxpr.trace(apply_fn, params, args)
        chosen = set(tree.chosen(params, where))
        followed = _uses.follow(traced.jaxpr, _walk.leaf_tags(traced))
        usable = {use.path for use in followed.uses if not _walk.BRANCHES & {*use.within}}
        if where is not None and (without := sorted(chosen - usable)):
            raise ValueError(
                "these leaves have no operation to tap; choose others with `where`:\n"
                + "\n".join(f"  {path!r} {_why(path, followed)}" for path in without)
            )
        out, found = _walk.run(traced, _walk.Plan(frozenset(chosen & usable), {}, {}, ()))
        uses: OrderedDict[str, list[Tap]] = OrderedDict()
        for each in found:
            for path, tap in each.items():
                uses.setdefault(path, []).append(tap)
        return out, OrderedDict(
            (path, Tap(t.input, t.output, tuple(later), t.primitive, t.x_axes, t.y_axes))
            for path, (t, *later) in uses.items()
        )

    return tapped


def replay(
    apply_fn: Callable[..., PyTree], ops: Mapping[str, Callable | tuple[Callable, PyTree]]
) -> Callable[..., PyTree]:
    """Return `apply_fn` with the operations of some leaves replaced by other functions.

    Wherever the leaf w at `path` is used, ``y = op.run(x, w)`` becomes ``y = fn(op, x, w)``, with
    ``ops = {path: fn}``, or ``fn(op, x, w, extra)``, with ``ops = {path: (fn, extra)}``:

    ============================  ==========================================================
    the function as it is         ``lambda op, x, w: op.run(x, w)``
    low rank on activations       ``lambda op, x, w, ab: op.run(x, w) + op.low_rank(x, *ab)``
    ablation                      ``lambda op, x, w: jnp.zeros_like(op.run(x, w))``
    activation patching           ``lambda op, x, w, y: y``, with y of `taps` as extra
    rescaling an output           ``lambda op, x, w: op.run(x, w) / scale``
    another leaf                  ``lambda op, x, w: op.run(x, other)``
    ============================  ==========================================================

    See `Op` for what `op` offers. `fn` must return the shape and dtype of the operation's output.
    All operations of the leaf are replaced (tied embeddings: a gather and a dot_general; see
    ``op.primitive``); other reads of the leaf, such as returning it, keep the leaf.

    Inside `lax.scan`, a leaf that is stacked over the iterations (layers) comes as its slice, and
    so does every array in `extra`, sliced along its first axis; an `extra` of a leaf that all
    iterations share comes whole (``extra[op.step[-1]]`` is its entry for the iteration). w is what
    enters the scan: cast to bfloat16 outside, it is bfloat16.

    Differentiate with respect to what `extra` holds by building the replay inside the function that
    is differentiated. With `low_rank`, no gradient of the shape of w is formed.

    Raises:
      ValueError: (when called) an unknown path; a leaf without an operation, or with a use that
        cannot be followed and so not be replaced; two replaced leaves in one operation; an output
        of another shape; an `extra` that does not have the leaf's leading axis.
      TypeError: an output of another dtype; a leaf of params or of an argument that is no array.

    LoRA (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685) on a
    dense layer, for the gradient of a and b alone:

    >>> import jax, jax.numpy as jnp
    >>> apply_fn = lambda params, x: jnp.tanh(x @ params["kernel"])
    >>> params, x = {"kernel": jnp.ones((6, 5))}, jnp.ones((2, 6))
    >>> def lora(op, x, w, theta):
    ...     return op.run(x, w) + op.low_rank(x, theta["a"], theta["b"])
    >>> def loss(theta):
    ...     return replay(apply_fn, {"kernel": (lora, theta)})(params, x).sum()
    >>> theta = {"a": jnp.ones((6, 2)), "b": jnp.zeros((2, 5))}
    >>> jax.tree.map(jnp.shape, jax.grad(loss)(theta))
    {'a': (6, 2), 'b': (2, 5)}
    """

    def replayed(params: PyTree, *args: PyTree):
        traced = _jaxpr.trace(apply_fn, params, args)
        fns = {path: op[0] if isinstance(op, tuple) else op for path, op in ops.items()}
        extra = {path: op[1] for path, op in ops.items() if isinstance(op, tuple)}
        for path in fns:
            if path not in traced.paths:
                near = ", ".join(map(repr, difflib.get_close_matches(path, traced.paths, 3, 0)))
                raise ValueError(f"ops: no leaf has the path {path!r}; the nearest: {near}")
        followed = _uses.follow(traced.jaxpr, _walk.leaf_tags(traced))
        used, lost = {use.path for use in followed.uses}, {path for path, _ in followed.losses}
        if bad := [path for path in fns if path not in used or path in lost]:
            raise ValueError(
                "the operations of these leaves cannot be replaced:\n"
                + "\n".join(f"  {path!r} {_why(path, followed)}" for path in bad)
            )
        return _walk.run(traced, _walk.Plan(frozenset(fns), fns, extra, ()))[0]

    return replayed


def _why(path: str, followed: _uses.Followed) -> str:
    reasons = [why for lost, why in followed.losses if lost == path]
    for use in followed.uses:
        if use.path == path and (around := [name for name in use.within if name in _walk.BRANCHES]):
            reasons.append(f"is used inside `{around[0]}` at {_jaxpr.source(use.eqn)}")
    if path not in followed.read:
        return "is never read"
    return "; ".join(dict.fromkeys(reasons)) or "is read, but meets no activation"
