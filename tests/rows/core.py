"""Rows of tree, trace, data and weights."""

from jaxkit import data, trace, tree
from tests.rows.base import Row, every_axis, examples, reversed_units


def parts_of(params):
    """Return the arrays of the blocks."""
    return {name: block.array for name, block in trace.blocks(params, every_axis(params)).items()}


ROWS = [
    Row(
        "tree.float32",
        lambda key, params, batch, n: tree.map(lambda path, w: tree.float32(w), params),
        smooth=True,
    ),
    Row(
        "tree.map",
        lambda key, params, batch, n: tree.map(lambda path, w: w * n, params),
        number=2.0,
        like_params=True,
        smooth=True,
    ),
    Row(
        "tree.ravel", lambda key, params, batch, n: tree.ravel(params)[0], local=False, smooth=True
    ),
    Row(
        "tree.replace",
        lambda key, params, batch, n: tree.replace(params, tree.chosen(params, tree.every(params))),
        like_params=True,
        smooth=True,
    ),
    Row("tree.keys", lambda key, params, batch, n: tree.keys(key, params, "contract"), random=True),
    Row("tree.topk", lambda key, params, batch, n: tree.topk(params, n * 4), number=3.0),
    Row(
        "tree.kth_largest",
        lambda key, params, batch, n: tree.kth_largest(params, n * 4),
        number=3.0,
        keeps=False,
    ),
    Row(
        "tree.quantile",
        lambda key, params, batch, n: tree.quantile(params, n),
        number=0.5,
        keeps=False,
    ),
    Row(
        "trace.permute",
        lambda key, params, batch, n: trace.permute(
            params, every_axis(params), reversed_units(params)
        ),
        like_params=True,
        local=False,
        smooth=True,
    ),
    Row(
        "trace.assemble",
        lambda key, params, batch, n: trace.assemble(params, every_axis(params), parts_of(params)),
        like_params=True,
        smooth=True,
    ),
    Row(
        "trace.blocks",
        lambda key, params, batch, n: parts_of(params),
        smooth=True,
    ),
    Row(
        "trace.take",
        lambda key, params, batch, n: trace.take(
            params, every_axis(params), reversed_units(params)
        ),
        like_params=True,
        local=False,
        smooth=True,
    ),
    Row(
        "data.random_labels",
        lambda key, params, batch, n: data.random_labels(key, *examples(batch), classes=9, p=n),
        number=1.0,
        random=True,
        shards=False,
    ),
    Row(
        "data.shuffled_pixels",
        lambda key, params, batch, n: data.shuffled_pixels(key, *examples(batch)),
        random=True,
        shards=False,
    ),
    Row(
        "data.random_pixels",
        lambda key, params, batch, n: data.random_pixels(key, *examples(batch)),
        random=True,
        shards=False,
    ),
    Row(
        "data.gaussian",
        lambda key, params, batch, n: data.gaussian(key, *examples(batch), std=n),
        number=2.0,
        random=True,
        shards=False,
    ),
]

EXEMPT = {
    "tree.chosen": "host-side: paths are strings",
    "tree.concrete": "host-side predicate",
    "tree.every": "host-side: a tree of Python bools",
    "tree.Where": "a type",
    "tree.check_key": "raises or does nothing; tested in test_tree.py",
    "tree.check_like": "raises or does nothing; tested in test_tree.py",
    "tree.flatten": "host-side: paths are strings",
    "tree.is_array": "host-side predicate",
    "tree.is_inexact": "host-side predicate",
    "tree.is_weight": "host-side predicate",
    "tree.paths": "host-side: paths are strings",
    "tree.select": "host-side: a tree of Python bools",
    "trace.Axis": "a type",
    "trace.Block": "a type",
    "trace.Concat": "a type",
    "trace.Op": "a type",
    "trace.Prod": "a type",
    "trace.Read": "a type",
    "trace.Role": "a type",
    "trace.Tap": "a type",
    "trace.Unfollowed": "a type",
    "trace.axes": "reads a jaxpr, no values; tested in trace/test_axes.py",
    "trace.check": "raises or returns a float; tested in trace/test_apply.py",
    "trace.named": "host-side: names and sizes",
    "trace.reads": "needs a network; tested in trace/test_blocks.py and by masks.apoz",
    "trace.rename": "host-side: names and sizes",
    "trace.replay": "a transform of functions; tested in trace/test_replay.py",
    "trace.resolve": "host-side: names and sizes",
    "trace.roles": "reads a jaxpr, no values; tested in trace/test_roles.py",
    "trace.taps": "a transform of functions; tested in trace/test_taps.py",
    "trace.unfollowed": "reads a jaxpr, no values; tested in trace/test_axes.py",
    "data.TwoLayer": "a type",
    "data.evaluate": "host-side, in float64; tested in data/test_interpolate.py",
    "data.two_layer": "host-side, in float64; tested in data/test_interpolate.py",
    "weights.files.Leaf": "a type",
    "weights.files.Stats": "a type",
    "weights.files.leaves": "reads a file",
    "weights.files.metadata": "reads a file",
    "weights.files.stats": "host-side, in float64; tested in weights/test_files.py",
}
