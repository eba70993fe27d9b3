import gzip
import struct

import numpy as np
import pytest

from experiments import data


def idx(values):
    values = np.asarray(values, np.uint8)
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    return header + values.tobytes()


def mnist(folder, n=60, m=20, pack=lambda b: b, suffix=""):
    rng = np.random.default_rng(0)
    out = {}
    for role, count in (("train", n), ("t10k", m)):
        x, y = rng.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        (folder / f"{role}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(x)))
        (folder / f"{role}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(y)))
        out[role] = x, y
    return out


def cifar_rows(n, classes, labels, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    y = np.arange(n, dtype=np.uint8) % classes
    columns = [y // 5, y] if labels == 2 else [y]
    return (
        x,
        y,
        np.concatenate([*(c[:, None] for c in columns), x.transpose(0, 3, 1, 2).reshape(n, -1)], 1)
        .astype(np.uint8)
        .tobytes(),
    )


def counts(y):
    return np.bincount(y, minlength=10)


def test_digits_are_split_by_class():
    d = data.load(train=1400, test=397)
    assert d.x.shape == (1400, 8, 8, 1) and d.x_test.shape == (397, 8, 8, 1)
    assert d.x.dtype == np.float32 and d.y.dtype == np.int32
    assert (d.x.min(), d.x.max(), d.classes) == (0, 1, 10)
    whole = counts(np.concatenate([d.y, d.y_test]))
    assert np.abs(counts(d.y) - whole * 1400 / 1797).max() < 2
    both = np.concatenate([d.x, d.x_test]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797  # no image is in both sets


def test_small_draws_keep_the_shares_of_the_classes_and_repeat():
    a, b = data.load(train=100, test=50), data.load(train=100, test=50)
    assert np.abs(counts(a.y) - 10).max() <= 2
    assert data.fingerprint(a) == data.fingerprint(b)
    assert data.fingerprint(a) != data.fingerprint(data.load(train=101, test=50))
    assert data.fingerprint(a) != data.fingerprint(data.load(train=100, test=50, seed=1))


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path, zipped):
    sets = mnist(tmp_path, pack=gzip.compress if zipped else bytes, suffix=".gz" * zipped)
    (tmp_path / "README.md").write_text("MNIST")
    d = data.load(tmp_path, train=60, test=20)
    assert d.name == f"IDX ({tmp_path.name})"
    np.testing.assert_array_equal(np.round(d.x[..., 0] * 255), sets["train"][0])
    np.testing.assert_array_equal(d.y, sets["train"][1])
    np.testing.assert_array_equal(np.round(d.x_test[..., 0] * 255), sets["t10k"][0])
    assert d.classes == 10
    assert counts(data.load(tmp_path, train=20, test=10).y).tolist() == [2] * 10


def test_a_file_beside_its_gzip_counts_once(tmp_path):
    mnist(tmp_path)
    mnist(tmp_path, pack=gzip.compress, suffix=".gz")
    assert data.load(tmp_path, train=60, test=20).x.shape == (60, 28, 28, 1)


def test_cifar_10_batches_are_joined(tmp_path):
    a, b, c = (cifar_rows(20, 10, 1, seed) for seed in range(3))
    for name, (_, _, content) in zip(
        ("data_batch_1", "data_batch_2", "test_batch"), (a, b, c), strict=True
    ):
        (tmp_path / f"{name}.bin").write_bytes(content)
    (tmp_path / "batches.meta.txt").write_text("airplane\n")
    d = data.load(tmp_path, train=40, test=20)
    assert (d.name, d.classes) == (f"CIFAR-10 ({tmp_path.name})", 10)
    np.testing.assert_array_equal(np.round(d.x * 255), np.concatenate([a[0], b[0]]))
    np.testing.assert_array_equal(d.y_test, c[1])


def test_cifar_100_takes_the_fine_labels(tmp_path):
    a, b = (cifar_rows(100, 100, 2, seed) for seed in range(2))
    (tmp_path / "train.bin").write_bytes(a[2])
    (tmp_path / "test.bin").write_bytes(b[2])
    d = data.load(tmp_path, train=100, test=100)
    assert (d.name, d.classes) == (f"CIFAR-100 ({tmp_path.name})", 100)
    np.testing.assert_array_equal(np.round(d.x * 255), a[0])
    np.testing.assert_array_equal(d.y, a[1])


def refuse(folder, match, train=60, test=20):
    with pytest.raises(ValueError, match=match):
        data.load(folder, train=train, test=test)


IMAGES = "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        (IMAGES, lambda b: b[:-1], r"shape \(60, 28, 28\) is truncated: 47055 bytes, 47056 are"),
        (IMAGES, lambda b: b + b"x", "too long"),
        (IMAGES, lambda b: b[:9], "header is truncated: 9 bytes of 16"),
        (IMAGES, lambda b: b"", "is empty"),
        (IMAGES, lambda b: b"hello", "5 bytes are no IDX file"),
        (IMAGES, lambda b: b[:2] + b"\x0d" + b[3:16] + 4 * b[16:], "uint8 images or labels"),
        (IMAGES, lambda b: gzip.compress(b)[:-20], "gzip file is truncated or damaged"),
        ("t10k-labels-idx1-ubyte", lambda b: idx([1, 2]), "holds 20 images, and .*holds 2 labels"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, name, damage, match):
    mnist(tmp_path)
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    refuse(tmp_path, f"{name}.*{match}" if "holds" not in match else match)


@pytest.mark.parametrize(("role", "what"), [("train", "labels"), ("t10k", "images")])
def test_a_missing_file_is_named(tmp_path, role, what):
    mnist(tmp_path)
    next(tmp_path.glob(f"{role}-{what}*")).unlink()
    refuse(tmp_path, f"no file with the {what} to {'train' if role == 'train' else 'test'}")


def test_a_truncated_cifar_batch_is_named(tmp_path):
    *_, content = cifar_rows(20, 10, 1, 0)
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    (tmp_path / "test_batch.bin").write_bytes(content[:-1])
    refuse(tmp_path, "test_batch.bin: 61459 bytes are no IDX file, no multiple of 3073")


def test_labels_out_of_range_are_no_cifar(tmp_path):
    *_, content = cifar_rows(20, 11, 1, 0)
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    refuse(tmp_path, r"data_batch_1.bin: .*labels below 10")


def test_folders_that_do_not_tell(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere is not a folder")
    (tmp_path / "cifar-10-batches-bin").mkdir()
    refuse(tmp_path, "only .'cifar-10-batches-bin'.; give the folder where the files")
    mnist(tmp_path)
    refuse(tmp_path, "60 images to train, and 61 are due", train=61)
    refuse(tmp_path, "at least one image", train=0)
    (tmp_path / "emnist-train-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 28, 28))))
    refuse(tmp_path, "several files with the images to train: emnist-train.*, train-images")
    (tmp_path / "emnist-train-images-idx3-ubyte").rename(tmp_path / "other-ubyte")
    refuse(tmp_path, "other-ubyte: the name does not say")
    (tmp_path / "other-ubyte").unlink()
    (tmp_path / "test.bin").write_bytes(cifar_rows(20, 10, 1, 0)[2])
    refuse(tmp_path, "several data sets, and one is due: .*IDX.*CIFAR-10")


def test_sets_of_different_shapes(tmp_path):
    mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 14, 14))))
    refuse(tmp_path, r"differ in shape: \(28, 28, 1\) and \(14, 14, 1\)")


def test_more_digits_than_there_are():
    refuse(None, "digits holds 1797 images; train=1400 and test=398", train=1400, test=398)
