"""Writing checkpoints: what another library reads back, and what an interruption leaves."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxkit.weights import files
from jaxkit.weights.diff import difference
from jaxkit.weights.write import writing

RNG = np.random.default_rng(0)
TREE = {
    "flags": RNG.random(3) < 0.5,
    "a/kernel": RNG.normal(size=(5, 7)).astype(np.float32),
    "a/half": RNG.normal(size=(4, 3)).astype(np.float16),
    "scalar": np.array(3.0),
    "empty": np.zeros((0, 4), np.float32),
    "b/brain": RNG.normal(size=(3, 2)).astype(ml_dtypes.bfloat16),
    "steps": np.arange(6).reshape(2, 3),
}
SPECS = {name: (x.shape, x.dtype) for name, x in TREE.items()}


def fill(put, names=(*TREE,)[::-1]):
    for name in names:
        put(name, TREE[name])


def same(found, want):
    assert found.dtype == want.dtype and found.shape == want.shape
    assert found.tobytes() == want.tobytes()


def test_the_format_s_own_reader_reads_it_back(tmp_path):
    out = tmp_path / "m.safetensors"
    with writing(out, SPECS, metadata={"format": "pt"}) as put:
        fill(put)
        assert not out.exists()
    loaded = load_file(out)
    assert loaded.keys() == TREE.keys()
    for name, x in TREE.items():
        same(loaded[name], x)
    with safe_open(out, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert files.metadata(out) == {"format": "pt"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    header = json.loads(out.read_bytes()[8:][: int.from_bytes(out.read_bytes()[:8], "little")])
    start = 8 + int.from_bytes(out.read_bytes()[:8], "little")
    for name, x in TREE.items():
        assert (start + header[name]["data_offsets"][0]) % x.dtype.itemsize == 0


def test_shards_hold_what_the_index_says(tmp_path):
    out = tmp_path / "m.safetensors.index.json"
    with writing(out, SPECS, shard_bytes=100) as put:
        fill(put)
    index = json.loads(out.read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in TREE.values())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert held.keys() == {n for n, s in index["weight_map"].items() if s == shard}
        assert sum(x.nbytes for x in held.values()) <= 100 or len(held) == 1
    found = files.leaves(out)
    for name, x in TREE.items():
        same(found[name].read(), x)


def test_an_error_leaves_what_was_there(tmp_path):
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="already"), writing(out, SPECS):
        pass
    with (
        pytest.raises(KeyError, match="unknown"),
        writing(out, SPECS, overwrite=True) as put,
    ):
        fill(put, [*TREE, "unknown"])
    with (
        pytest.raises(ValueError, match="leaf 'a/half' was never written"),
        writing(out, SPECS, overwrite=True) as put,
    ):
        fill(put, [name for name in TREE if name != "a/half"])
    with (
        pytest.raises(ValueError, match=r"leaf 'flags' is int64\[6\], and bool\[3\] was due"),
        writing(out, SPECS, overwrite=True) as put,
    ):
        put("flags", np.arange(6))
    assert out.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    with writing(out, SPECS, overwrite=True) as put:
        fill(put)
    assert len(files.leaves(out)) == len(TREE)


def test_names_and_types_that_the_format_has_not(tmp_path):
    with pytest.raises(ValueError, match=r"\.safetensors or"), writing(tmp_path / "m.bin", SPECS):
        pass
    strange = {"w": ((2,), np.dtype(np.complex128))}
    with (
        pytest.raises(ValueError, match="leaf 'w' has dtype complex128"),
        writing(tmp_path / "m.safetensors", strange),
    ):
        pass


def test_difference_against_numpy():
    a = RNG.normal(size=1000).astype(np.float32)
    b = np.where(RNG.random(1000) < 0.3, RNG.normal(size=1000), a).astype(np.float32)
    a[:5], b[:5] = 0, [0, 1, -1, 0, 2]
    leaf = lambda x: files.Leaf(x.shape, x.dtype, lambda: x)
    got = difference(leaf(a), leaf(b), piece=64)
    x, y = a.astype(np.float64), b.astype(np.float64)
    assert got.size == 1000 and got.changed == np.sum(a != b)
    norms = [np.linalg.norm(v) for v in (x, y, y - x)]
    np.testing.assert_allclose([got.norm_a, got.norm_b, got.norm], norms, rtol=1e-12)
    np.testing.assert_allclose(got.cosine, x @ y / norms[0] / norms[1], rtol=1e-12)
    assert got.same_sign == np.mean(np.sign(x) == np.sign(y))
    still = difference(leaf(a), leaf(a))
    assert (still.changed, still.norm, still.same_sign) == (0, 0.0, 1.0)
    np.testing.assert_allclose(still.cosine, 1, rtol=1e-12)
    nans = np.array([np.nan, 1.0])
    assert difference(leaf(nans), leaf(nans)).changed == 0
    with pytest.raises(ValueError, match="shapes differ"):
        difference(leaf(a), leaf(a[:3]))
