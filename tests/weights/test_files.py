import json
import math
import pickle
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxkit import tree
from jaxkit.weights import files

NUMPY = "bool uint8 int8 uint16 int16 float16 uint32 int32 float32 uint64 int64 float64 bfloat16"
FLOAT8 = "float8_e4m3fn float8_e5m2"


def random(seed, shape, dtype):
    """Bytes of any value, NaN and infinities among them (bools are 0 or 1)."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    raw = rng.integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("dtype", [*NUMPY.split(), *FLOAT8.split()])
def test_every_dtype_reads_the_bits_that_were_written(tmp_path, dtype):
    written = {
        "matrix": random(0, (5, 7), dtype),
        "scalar": random(1, (), dtype),
        "empty": random(2, (0, 3), dtype),
        "deep/er.kernel": random(3, (2, 1, 3), dtype),
    }
    file = tmp_path / "model.safetensors"
    save_file(written, file, metadata={"format": "np"})
    found = files.leaves(file)
    assert found.keys() == written.keys()
    for name, leaf in found.items():
        assert (leaf.shape, leaf.dtype) == (written[name].shape, written[name].dtype)
        assert same(leaf.read(), written[name])
    if dtype not in FLOAT8.split():  # the library's own reader, where it has one
        with safe_open(file, framework="numpy") as other:
            assert all(same(leaf.read(), other.get_tensor(n)) for n, leaf in found.items())


def by_hand(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_types_that_the_library_cannot_write(tmp_path):
    data = {
        "C64": random(0, (3,), np.complex64),
        "F8_E8M0": random(1, (5,), ml_dtypes.float8_e8m0fnu),
        "F8_E4M3FNUZ": random(2, (4,), ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": random(3, (6,), ml_dtypes.float8_e5m2fnuz),
    }
    file = tmp_path / "model.safetensors"
    for code, array in data.items():
        entry = {"dtype": code, "shape": [*array.shape], "data_offsets": [0, array.nbytes]}
        file.write_bytes(by_hand({"x": entry}, array.tobytes()))
        try:
            with safe_open(file, framework="numpy"):
                pass
        except Exception:  # an older library, which does not know the type
            with pytest.raises(ValueError, match=str(file)):
                files.leaves(file)
        else:
            assert same(files.leaves(file)["x"].read(), array)


def test_leaves_come_in_the_order_of_the_file(tmp_path):
    entry = lambda a, b: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]}
    header = {"a": entry(6, 9), "c": entry(0, 4), "b": entry(4, 6)}
    file = tmp_path / "model.safetensors"
    file.write_bytes(by_hand(header, bytes(range(9))))
    found = files.leaves(file)
    assert [leaf.read().tolist() for leaf in found.values()] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    assert list(found) == ["c", "b", "a"]


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_file({"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float16)}, whole)
    data = whole.read_bytes()
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut.safetensors: not a complete safetensors file"):
            files.leaves(cut)
    cut.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=r"cut.safetensors"):
        files.leaves(cut)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        by_hand(b"{", b""),
        by_hand(b"not json at all", b""),
        by_hand(b"\xff\xfe{}", b""),
        by_hand([1, 2], b""),
        by_hand({"x": 3}, b""),
        by_hand({"x": {**F32, "dtype": "F99"}}, bytes(8)),
        by_hand({"x": {**F32, "shape": [3]}}, bytes(8)),
        by_hand({"x": {**F32, "shape": [-2]}}, bytes(8)),
        by_hand({"x": {**F32, "shape": [1 << 62, 1 << 62]}}, bytes(8)),
        by_hand({"x": {**F32, "data_offsets": [0, 1 << 40]}}, bytes(8)),
        by_hand({"x": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
        by_hand({"x": F32, "y": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
        struct.pack("<Q", 1 << 63) + bytes(100),
        struct.pack("<Q", 1000) + b"{}",
    ],
)
def test_a_corrupt_header_is_an_error_of_one_line(tmp_path, content):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.safetensors: not a complete safetensors") as caught:
        files.leaves(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(file))


def test_a_packed_dtype_is_named(tmp_path):
    file = tmp_path / "packed.safetensors"
    entry = {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}
    file.write_bytes(by_hand({"w": entry}, bytes(2)))
    with pytest.raises(
        ValueError, match=r"packed.safetensors: .*(leaf 'w' has dtype F4|`F4`|head)"
    ):
        files.leaves(file)


def test_a_file_cut_after_it_was_listed(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": np.ones((3, 2), np.float32)}, file)
    leaf = files.leaves(file)["w"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors: leaf 'w' ends early"):
        leaf.read()


def test_nothing_there_and_not_a_file(tmp_path):
    for name in ("nothing", "nothing.safetensors", "nothing.index.json", "nothing.pt"):
        with pytest.raises(FileNotFoundError, match=name):
            files.leaves(tmp_path / name)
    with pytest.raises(ValueError, match="/dev/null: not a regular file"):
        files.leaves("/dev/null")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["w.pt", "w.PTH", "pytorch_model.bin", "w.pkl", "w.safetensors"])
def test_pickle_is_refused_and_never_run(tmp_path, name, protocol):
    (tmp_path / name).write_bytes(pickle.dumps({"w": Bomb(tmp_path / "ran")}, protocol))
    plain = protocol < 2 and name.endswith("safetensors")  # a text that could be anything
    with pytest.raises(ValueError, match="not a complete" if plain else "never reads pickle"):
        files.leaves(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert (tmp_path / "ran").exists()  # reading it would have run it


def test_a_zip_of_pickles_under_another_name(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(ValueError, match="never reads pickle"):
        files.leaves(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------- index


@pytest.fixture
def sharded(tmp_path):
    parts = [{"a": np.arange(3.0), "b": np.eye(2, dtype=np.float32)}, {"c": np.ones(4, np.int8)}]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05}-of-00002.safetensors"
        save_file(part, tmp_path / name)
        weight_map |= dict.fromkeys(part, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    return index, weight_map, parts[0] | parts[1]


def test_an_index_reads_all_its_shards(sharded):
    index, _, written = sharded
    found = files.leaves(index)
    assert found.keys() == written.keys()
    assert all(same(leaf.read(), written[name]) for name, leaf in found.items())


def test_an_index_that_contradicts_its_shards(sharded):
    index, weight_map, _ = sharded

    def error(changed, kind=ValueError):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(kind) as caught:
            files.leaves(index)
        return str(caught.value)

    first, second = weight_map["a"], weight_map["c"]
    lacking = f"its shard {second} does not have the leaf 'd'"
    assert lacking in error(weight_map | {"d": second})
    without = {k: v for k, v in weight_map.items() if k != "b"}
    extra = f"its shard {first} has, contrary to the index, the leaf 'b'"
    assert extra in error(without)
    assert extra in error(weight_map | {"b": second})
    assert "shard gone.safetensors is missing" in error(
        weight_map | {"d": "gone.safetensors"}, FileNotFoundError
    )
    (index.parent / "w.bin").write_bytes(b"")
    assert "never reads pickle" in error({"d": "w.bin"})
    (index.parent / second).write_bytes(b"cut")
    assert f"{second}: not a complete safetensors file" in error(weight_map)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\xff"]
)
def test_what_is_not_an_index(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index.json: not the index of"):
        files.leaves(index)


# ------------------------------------------------------------------------------------- orbax


class State(NamedTuple):
    count: jax.Array
    mu: dict


@pytest.fixture(scope="module")
def params():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    spread = NamedSharding(mesh, PartitionSpec("x", "y"))
    return {
        "Dense_0": {
            "kernel": jax.device_put(jnp.arange(128.0).reshape(16, 8), spread),
            "bias": jnp.arange(-4, 4, dtype=jnp.bfloat16),
        },
        "blocks": [jnp.ones(3, jnp.float8_e4m3fn), jnp.array([True, False])],
        "zeros": jnp.zeros((4, 4)),
        "nibbles": jnp.arange(4, dtype=jnp.int4),
        "numpy": np.arange(6.0).reshape(2, 3),
        "linear/~/w": jnp.float32(2.5),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    """The layouts that orbax writes."""
    root = tmp_path_factory.mktemp("orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(root / "standard", params)
        checkpointer.wait_until_finished()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(root / "plain", args=ocp.args.PyTreeSave(params))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        checkpointer.save(root / "zarr3", args=ocp.args.PyTreeSave(params))
    with ocp.CheckpointManager(root / "manager") as manager:
        manager.save(9, args=ocp.args.StandardSave({"w": jnp.zeros(1)}))
        manager.save(10, args=ocp.args.StandardSave(params))
    state = {"state": State(jnp.int32(7), {"w": jnp.ones(2)}), "step": 3, "name": "a run"}
    with ocp.CheckpointManager(root / "items") as manager:
        items = {"params": ocp.args.StandardSave(params), "rest": ocp.args.PyTreeSave(state)}
        manager.save(0, args=ocp.args.Composite(**items, config=ocp.args.JsonSave({"a": 1})))
    return root


@pytest.mark.parametrize("layout", ["standard", "plain", "zarr3", "manager/10"])
def test_orbax_layouts(folder, params, layout):
    written = tree.flatten(params)
    found = files.leaves(folder / layout)
    assert found.keys() == written.keys()
    for path, leaf in found.items():
        array = np.asarray(written[path])
        assert (leaf.shape, leaf.dtype) == (array.shape, array.dtype), path
        assert same(leaf.read(), array), path


def test_a_step_of_several_items(folder, params):
    found = files.leaves(folder / "items" / "0")
    expected = {f"params/{path}" for path in tree.flatten(params)}
    assert found.keys() == expected | {"rest/state/count", "rest/state/mu/w", "rest/step"}
    assert found["rest/state/count"].read() == 7
    assert found["rest/step"].read() == 3
    assert found["params/blocks/1"].read().tolist() == [True, False]
    assert files.leaves(folder / "items" / "0" / "rest").keys() == {
        "state/count",
        "state/mu/w",
        "step",
    }


def test_a_folder_of_checkpoints_names_the_newest(folder):
    with pytest.raises(ValueError, match=r"manager: a folder of 2 .* such as .*manager/10$"):
        files.leaves(folder / "manager")


def test_folders_that_are_no_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"not an orbax checkpoint of a tree$"):
        files.leaves(tmp_path)
    save_file({"w": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"give a file, such as .*/model.safetensors$"):
        files.leaves(tmp_path)


def test_unfinished_and_damaged_orbax(folder, tmp_path):
    copy = lambda source, name: shutil.copytree(folder / source, tmp_path / name)

    unfinished = copy("standard", "3.orbax-checkpoint-tmp-1")
    with pytest.raises(ValueError, match="never finished"):
        files.leaves(unfinished)
    with pytest.raises(ValueError, match="not an orbax checkpoint"):
        files.leaves(tmp_path)

    described = copy("standard", "described")
    (described / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="described: damaged: _METADATA") as caught:
        files.leaves(described)
    assert "\n" not in str(caught.value)

    missing = copy("plain", "missing")
    (missing / "zeros" / "0.0").unlink()  # a chunk: zarr alone would fill it with zeros
    leaf = files.leaves(missing)["zeros"]
    with pytest.raises(ValueError, match="missing: leaf 'zeros' cannot be read") as caught:
        leaf.read()
    assert "\n" not in str(caught.value)

    cut = copy("standard", "cut")
    for data in cut.rglob("d/*"):
        data.write_bytes(data.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"cut: leaf '.*' cannot be read: ") as caught:
        [leaf.read() for leaf in files.leaves(cut).values()]
    assert "\n" not in str(caught.value)


def test_two_leaves_of_one_path(tmp_path):
    tree = {"a/b": np.ones(2), "a": {"b": np.zeros(3)}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "twice", args=ocp.args.PyTreeSave(tree))
    with pytest.raises(ValueError, match="twice: two leaves have the path 'a/b'"):
        files.leaves(tmp_path / "twice")


@pytest.mark.parametrize("text", ["", "3", "{}", '{"tree_metadata": {"a": 1}}', "[" * 100_000])
def test_metadata_that_is_not_orbax(tmp_path, text):
    (tmp_path / "_METADATA").write_text(text)
    with pytest.raises(ValueError, match="damaged: _METADATA is not orbax's"):
        files.leaves(tmp_path)


# ----------------------------------------------------------------------------------- reading


def test_a_leaf_at_a_time_is_all_that_is_in_memory(tmp_path):
    count, size = 8, 1 << 20
    file = tmp_path / "model.safetensors"
    save_file({f"w{i}": np.full(size, i, ml_dtypes.bfloat16) for i in range(count)}, file)
    tracemalloc.start()
    try:
        norms = [files.stats(leaf.read()).norm for leaf in files.leaves(file).values()]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert norms == [1024.0 * i for i in range(count)]
    assert peak < 2 * size + 2e6  # one leaf, and the pieces in which it is looked at


# ------------------------------------------------------------------------------------- stats

floats = hnp.arrays(
    st.sampled_from([np.float16, np.float32, np.float64]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    elements=st.sampled_from([0.0, -0.0, 1.0, -2.5, math.nan, math.inf, -math.inf]),
)


@given(floats)
@settings(max_examples=100, deadline=None)
def test_stats_counts_every_kind_of_entry(array):
    found = files.stats(array)
    values = array.astype(np.float64).ravel().tolist()
    nan, inf = sum(map(math.isnan, values)), sum(map(math.isinf, values))
    assert found[:2] == (len(values), values.count(0.0))
    assert (found.nan, found.inf) == (nan, inf)
    if nan:
        assert math.isnan(found.norm)
    elif inf:
        assert found.norm == math.inf
    else:
        assert found.norm == pytest.approx(math.sqrt(math.fsum(v * v for v in values)), rel=1e-14)


@pytest.mark.parametrize("scale", [1e300, 1e160, 1.0, 1e-160, 1e-300, 5e-324])
def test_the_norm_neither_overflows_nor_vanishes(scale):
    n = 200_000  # more than one piece
    array = np.full(n, scale)
    array[n // 2 :] = 0
    found = files.stats(array)
    assert found.norm == pytest.approx(scale * math.sqrt(n // 2), rel=1e-12)
    assert (found.zeros, found.nan, found.inf) == (n // 2, 0, 0)


@pytest.mark.parametrize("dtype", [*FLOAT8.split(), "int8", "uint8"])
def test_stats_of_every_byte(dtype):
    array = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype))
    values = [float(v) for v in array]
    found = files.stats(array)
    finite = [v for v in values if math.isfinite(v)]
    assert found.zeros == values.count(0.0)
    assert found.nan == sum(map(math.isnan, values)) and found.inf == sum(map(math.isinf, values))
    norm = math.sqrt(math.fsum(v * v for v in finite))
    assert files.stats(array[np.isfinite(values)]).norm == pytest.approx(norm, rel=1e-14)


def test_stats_of_bools_integers_and_complex():
    assert files.stats(np.array([[True, False], [True, True]]))[:3] == (4, 1, math.sqrt(3))
    big = np.array([2**62, 0, -(2**62)], np.int64)
    assert files.stats(big)[:2] == (3, 1)
    assert files.stats(big).norm == pytest.approx(2**62 * math.sqrt(2), rel=1e-14)
    assert files.stats(np.array([3 + 4j, 0j, -12j], np.complex64)) == (3, 1, 13.0, 0, 0)
    assert files.stats(np.array([complex(math.nan, 1), 1j])).nan == 1
    assert files.stats(np.zeros((0, 4), ml_dtypes.bfloat16)) == (0, 0, 0.0, 0, 0)
