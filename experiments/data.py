"""Labelled images: scikit-learn's digits, or MNIST and CIFAR files from a folder.

Files are told by what they hold, not by what they are called: IDX files (MNIST and its kin, raw or
gzipped) and the binary batches of CIFAR-10 and CIFAR-100. Their names only say which are for
training (``train``, ``data_batch``) and which for testing (``test``, ``t10k``). Nothing is
unpickled and nothing is downloaded.
"""

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8


class Data(NamedTuple):
    """A training and a test set of images in [0, 1] with integer labels."""

    name: str
    classes: int
    x: Float[np.ndarray, "n height width channels"]
    y: Int[np.ndarray, " n"]
    x_test: Float[np.ndarray, "m height width channels"]
    y_test: Int[np.ndarray, " m"]


class Part(NamedTuple):
    """What one file holds: images, labels, or both."""

    kind: str
    images: UInt8[np.ndarray, "n height width channels"] | None
    labels: Int[np.ndarray, " n"] | None


def load(folder: Path | None = None, *, train: int, test: int, seed: int = 0) -> Data:
    """Load `train` and `test` images, drawn by class, of the digits or of the files in `folder`.

    Raises:
      ValueError: a file that is truncated, of another format, ambiguous or missing, named; or more
        images asked for than there are.
      OSError: a file that cannot be read.
    """
    for name, count in (("train", train), ("test", test)):
        if count < 1:
            raise ValueError(f"{name}={count}: at least one image is due")
    if folder is None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = np.reshape(x, (-1, 8, 8, 1)) / 16
        if train + test > len(y):
            raise ValueError(
                f"digits holds {len(y)} images; train={train} and test={test} ask for more"
            )
        chosen = _draw(y, train + test, seed)
        first = _draw(y[chosen], train, seed + 1)
        rest = np.setdiff1d(np.arange(len(chosen)), first)
        sets = [(x[i], y[i]) for i in (chosen[first], chosen[rest])]
        name, top = "digits", 1.0
    else:
        name, sets = _read_folder(folder)
        for role, count, (_, y) in zip(("train", "test"), (train, test), sets, strict=True):
            if count > len(y):
                raise ValueError(f"{folder} holds {len(y)} images to {role}, and {count} are due")
        draws = [_draw(y, n, seed) for n, (_, y) in zip((train, test), sets, strict=True)]
        sets = [(x[i], y[i]) for i, (x, y) in zip(draws, sets, strict=True)]
        top = 255.0
    scaled = [((x / top).astype(np.float32), y.astype(np.int32)) for x, y in sets]
    (x, y), (x_test, y_test) = scaled
    classes = int(max(y.max(), y_test.max())) + 1
    return Data(name, classes, x, y, x_test, y_test)


def fingerprint(data: Data) -> str:
    """Return a hash of the values of a data set."""
    digest = hashlib.sha256(repr((data.name, data.classes)).encode())
    for array in (data.x, data.y, data.x_test, data.y_test):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def shifted(images: Float[np.ndarray, "n height width channels"]) -> np.ndarray:
    """Put images at nine places, up to a pixel from their own, one place after the other.

    >>> shifted(np.ones((2, 3, 3, 1))).shape
    (18, 3, 3, 1)
    """
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = images.shape[1:3]
    return np.concatenate([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)])


def _draw(y: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` positions so that every class keeps its share up to one, sorted."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    classes, members = np.unique(y[order], return_inverse=True)
    rank = np.empty(len(y))
    for c in range(len(classes)):
        (own,) = np.nonzero(members == c)
        rank[own] = (np.arange(len(own)) + rng.uniform()) / len(own)
    return np.sort(order[np.argsort(rank, kind="stable")[:count]])


# ------------------------------------------------------------------------------------- files


def _read_folder(folder: Path):
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    raw = {path.name for path in files}
    files = [path for path in files if path.suffix != ".gz" or path.stem not in raw]
    parts = {path: part for path in files if (part := _read_file(path)) is not None}
    if not parts:
        inside = sorted(path.name for path in folder.iterdir())[:8]
        raise ValueError(
            f"{folder} holds no IDX file and no CIFAR binary batch, only {inside or 'nothing'}; "
            "give the folder where the files themselves lie"
        )
    kinds = {part.kind: path for path, part in parts.items()}
    if len(kinds) > 1:
        named = ", ".join(f"{path.name} ({kind})" for kind, path in kinds.items())
        raise ValueError(f"{folder} holds several data sets, and one is due: {named}")
    roles: dict[str, dict[Path, Part]] = {"train": {}, "test": {}}
    for path, part in parts.items():
        roles[_role(path)][path] = part
    sets = [_assemble(folder, role, found) for role, found in roles.items()]
    if sets[0][0].shape[1:] != sets[1][0].shape[1:]:
        shapes = f"{sets[0][0].shape[1:]} and {sets[1][0].shape[1:]}"
        raise ValueError(f"{folder}: the images to train and to test differ in shape: {shapes}")
    (kind,) = kinds
    return f"{kind} ({folder.name})", sets


def _role(path: Path) -> str:
    name = path.name.lower()
    train = "train" in name or "data_batch" in name
    test = "t10k" in name or "test" in name
    if train == test:
        raise ValueError(
            f"{path}: the name does not say whether the file is for training (train, data_batch) "
            "or for testing (test, t10k)"
        )
    return "train" if train else "test"


def _assemble(folder: Path, role: str, parts: dict[Path, Part]):
    """Join the parts of one set: CIFAR batches end to end, IDX images with their labels."""
    images = {path: part.images for path, part in parts.items() if part.images is not None}
    labels = {path: part.labels for path, part in parts.items() if part.labels is not None}
    for what, found in (("images", images), ("labels", labels)):
        if not found:
            raise ValueError(f"{folder} holds no file with the {what} to {role}")
        if len(found) > 1 and set(images) != set(labels):
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder} holds several files with the {what} to {role}: {names}")
    x, y = np.concatenate(list(images.values())), np.concatenate(list(labels.values()))
    if len(x) != len(y):
        (a,), (b,) = images, labels
        raise ValueError(f"{a} holds {len(x)} images, and {b} holds {len(y)} labels")
    return x, y


def _read_file(path: Path) -> Part | None:
    """Read one file; None if it is nothing of ours."""
    name = path.name.lower().removesuffix(".gz")
    ours = name.endswith(".bin") or "ubyte" in name or "idx" in name
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(512)
            is_idx = len(head) >= 4 and head[:2] == b"\0\0" and head[2] in _IDX and 0 < head[3] < 5
            size = path.stat().st_size
            if not (ours or is_idx or (not packed and (size % 3073 == 0 or size % 3074 == 0))):
                return None
            content = head + file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        if not ours:
            return None
        raise ValueError(f"{path}: the gzip file is truncated or damaged ({error})") from error
    if not content:
        if ours:
            raise ValueError(f"{path} is empty")
        return None
    problem = None
    if is_idx:
        part, problem = _idx(content)
        if part:
            return part
    if part := _cifar(content):
        return part
    if problem is None and ours:
        problem = (
            f"{len(content)} bytes are no IDX file, no multiple of 3073 (a CIFAR-10 image and its "
            "label) with labels below 10, and none of 3074 (CIFAR-100) with labels below 20 and 100"
        )
    if problem:
        raise ValueError(f"{path}: {problem}")
    return None


_IDX = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}


def _idx(content: bytes) -> tuple[Part | None, str | None]:
    dtype, ndim = _IDX[content[2]], content[3]
    start = 4 + 4 * ndim
    if len(content) < start:
        return None, f"the IDX header is truncated: {len(content)} bytes of {start}"
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", ndim, 4))
    due = start + math.prod(shape) * np.dtype(dtype).itemsize
    if len(content) != due:
        what = "truncated" if len(content) < due else "too long"
        return None, f"the IDX file of shape {shape} is {what}: {len(content)} bytes, {due} are due"
    if dtype != "uint8" or ndim == 2:
        return None, f"an IDX file of uint8 images or labels is due, and {dtype}{shape} came"
    values = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    if ndim == 1:
        return Part("IDX", None, values), None
    return Part("IDX", values.reshape(*shape[:3], *(shape[3:] or [1])), None), None


def _cifar(content: bytes) -> Part | None:
    for kind, labels, tops in (("CIFAR-10", 1, [10]), ("CIFAR-100", 2, [20, 100])):
        if len(content) % (labels + 3072):
            continue
        rows = np.frombuffer(content, np.uint8).reshape(-1, labels + 3072)
        if (rows[:, :labels] < np.array(tops)).all():
            images = rows[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            return Part(kind, images, rows[:, labels - 1])
    return None
