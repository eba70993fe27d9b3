"""Leaves of a checkpoint on disk, one at a time.

`leaves` lists what a safetensors file, a sharded safetensors index or an orbax checkpoint holds
without reading any of its data; each leaf is then read when asked for, so that a leafwise
computation needs memory for a few leaves however large the checkpoint is.
"""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

__all__ = ["Leaf", "Stats", "leaves", "metadata", "stats"]

_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_NO_PICKLE = (
    "jaxkit never reads pickle (reading one can run any code); "
    "convert it to safetensors where you trust it"
)

# Every type of the format whose entries are whole bytes; the packed ones (F4, F6) are not here.
SAFETENSORS_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
}


@dataclass(frozen=True)
class Leaf:
    """One array of a checkpoint: what it is, and how to get it.

    Attributes:
      shape: its shape.
      dtype: its numpy dtype (bfloat16, float8 and int4 are those of `ml_dtypes`, as in JAX).
      read: reads the array from disk, anew at every call; nothing is kept. Raises ValueError
        naming the file and the leaf if the data have been damaged or cut.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def leaves(path: str | os.PathLike[str]) -> dict[str, Leaf]:
    """Return the leaves of a checkpoint by path, without reading their data.

    Args:
      path: one of

        * a safetensors file. A leaf's path is its name in the file, and the order is that of the
          data, so that reading one leaf after another reads the file from front to back;
        * the index of a sharded safetensors checkpoint (``model.safetensors.index.json``), whose
          shards lie beside it;
        * an orbax checkpoint of a tree: the folder that a ``StandardCheckpointer`` or
          ``PyTreeCheckpointer`` wrote, or one step of a ``CheckpointManager``. A leaf's path is
          its key path joined by ``/``, with the name of the item in front where the step holds
          more than one tree (``state/params/kernel``). Orbax stores an NNX state as dicts, so
          that its paths end in ``/value`` here. Leaves that are not arrays or numbers (strings,
          None) are left out.

    Returns:
      A dict from path to `Leaf`.

    Raises:
      FileNotFoundError: there is nothing at `path`, or a shard is missing.
      ValueError: it is no checkpoint, it is cut or damaged (header, offsets, shards that
        contradict the index), it has a dtype that numpy cannot hold, or it is a pickle, which
        jaxkit never reads because reading one runs whatever code it holds. The message names the
        file and is one line.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "model.safetensors"
    ...     save_file({"dense/kernel": np.eye(3, dtype=np.float32)}, file)
    ...     found = leaves(file)
    ...     kernel = found["dense/kernel"]
    ...     print(list(found), kernel.shape, kernel.dtype, kernel.read().trace())
    ['dense/kernel'] (3, 3) float32 3.0
    """
    path = Path(path)
    if path.is_dir():
        return _orbax(path)
    if path.suffix == ".json":
        return _index(path)
    return _safetensors(path)


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the strings that the header of a safetensors file carries.

    Of a sharded checkpoint, those of its first shard; of an orbax checkpoint, none.

    Raises:
      ValueError, FileNotFoundError: as `leaves`.
    """
    path = Path(path)
    if path.is_dir():
        return {}
    if path.suffix == ".json":
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
        path = path.parent / min(shards)
    with safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


# ------------------------------------------------------------------------------- safetensors


def _safetensors(path: Path) -> dict[str, Leaf]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise ValueError(f"{path}: {_NO_PICKLE}")
    try:
        # The library checks the header: its length, its JSON, and that the tensors tile the rest
        # of the file exactly.
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            specs = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        if _looks_pickled(path):
            raise ValueError(f"{path}: {_NO_PICKLE}") from None
        raise ValueError(f"{path}: not a complete safetensors file: {_line(error)}") from None
    # It maps the whole file into memory and does not read float8 into numpy, so the data are read
    # by byte range instead.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for name in sorted(specs, key=lambda name: header[name]["data_offsets"]):
        code, shape = specs[name]
        if code not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: leaf {name!r} has dtype {code}, which numpy cannot hold")
        dtype = np.dtype(SAFETENSORS_DTYPES[code])
        start = 8 + length + header[name]["data_offsets"][0]
        read = partial(_read_range, path.absolute(), name, shape, dtype, start)
        found[name] = Leaf(shape, dtype, read)
    return found


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(8)
    # A zip archive (torch.save), or pickle protocol 2 and above where a safetensors file has the
    # length of its header, of at most 100 MB.
    return head.startswith(b"PK\x03\x04") or (
        head.startswith(b"\x80") and int.from_bytes(head, "little") > 100_000_000
    )


def _read_range(
    path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype, start: int
) -> np.ndarray:
    count = math.prod(shape)
    array = np.fromfile(path, dtype, count, offset=start)
    if array.size != count:
        raise ValueError(f"{path}: leaf {name!r} ends early: the file was cut while being read")
    return array.reshape(shape)


def _index(path: Path) -> dict[str, Leaf]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        shard_of = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(shard, str) for shard in shard_of.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"{path}: not the index of a sharded safetensors checkpoint: "
            "due is a JSON object whose weight_map maps leaves to files"
        ) from None
    found = {}
    for shard in sorted(set(shard_of.values())):
        if not (path.parent / shard).exists():
            raise FileNotFoundError(f"{path}: its shard {shard} is missing")
        held = _safetensors(path.parent / shard)
        listed = {name for name, file in shard_of.items() if file == shard}
        for name in sorted(listed ^ held.keys()):
            has = "does not have" if name in listed else "has, contrary to the index,"
            raise ValueError(f"{path}: its shard {shard} {has} the leaf {name!r}")
        found |= held
    return found


# ------------------------------------------------------------------------------------- orbax


def _orbax(path: Path) -> dict[str, Leaf]:
    if _unfinished(path.absolute()):
        raise ValueError(f"{path}: an orbax checkpoint whose writing was never finished")
    if _is_tree(path):
        return _orbax_tree(path)
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    # The items of a step are trees; a folder that has this file is a checkpoint in itself.
    own = [f for f in folders if not _unfinished(f) and (f / "_CHECKPOINT_METADATA").is_file()]
    items = [folder for folder in folders if _is_tree(folder) and folder not in own]
    if len(items) == 1:
        return _orbax_tree(items[0])
    if items:
        return {f"{i.name}/{name}": leaf for i in items for name, leaf in _orbax_tree(i).items()}
    if own:
        last = max(own, key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)])
        raise ValueError(f"{path}: a folder of {len(own)} checkpoint(s); give one, such as {last}")
    files = [*path.glob("*.safetensors.index.json"), *path.glob("*.safetensors")]
    hint = f"; give a file, such as {files[0]}" if files else ""
    raise ValueError(f"{path}: a folder, but not an orbax checkpoint of a tree{hint}")


def _is_tree(folder: Path) -> bool:
    return not _unfinished(folder) and (folder / "_METADATA").is_file()


def _unfinished(folder: Path) -> bool:
    return ".orbax-checkpoint-tmp" in folder.name


def _orbax_tree(folder: Path) -> dict[str, Leaf]:
    import tensorstore as ts

    # The library's reader of this file opens the arrays in an event loop, which it abandons, with
    # tracebacks on stderr, where one is damaged; and it starts JAX's backends.
    folder = folder.absolute()
    try:
        tree = json.loads((folder / "_METADATA").read_bytes())
        driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        zeros_are_stored = bool(tree.get("store_array_data_equal_to_fill_value"))
        arrays = [
            [str(key["key"]) for key in leaf["key_metadata"]]
            for leaf in tree["tree_metadata"].values()
            if leaf["value_metadata"]["value_type"] != "string"
            and not leaf["value_metadata"]["skip_deserialize"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}: damaged: _METADATA is not orbax's: {_line(error)}") from None
    files = {"driver": "file", "path": f"{folder}/"}
    context = ts.Context()
    opening = {}
    for keys in arrays:
        name = ".".join(keys)
        if (folder / "manifest.ocdbt").exists():
            store = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
        else:
            store = {"driver": "file", "path": f"{folder}/{name}/"}
        # Where zeros are stored like all else, a chunk that is missing is damage.
        missing = {"fill_missing_data_reads": not zeros_are_stored}
        spec = {"driver": driver, "kvstore": store, **missing}
        path = "/".join(keys)
        if path in opening:
            raise ValueError(f"{folder}: two leaves have the path {path!r}")
        opening[path] = ts.open(spec, read=True, context=context)
    found = {}
    for path, future in opening.items():
        store = _result(future, folder, path)
        read = partial(_read_store, store, folder, path)
        found[path] = Leaf(store.shape, store.dtype.numpy_dtype, read)
    return found


def _read_store(store: Any, folder: Path, path: str) -> np.ndarray:
    return np.asarray(_result(store.read(), folder, path))


def _result(future: Any, folder: Path, path: str) -> Any:
    try:
        return future.result()
    except Exception as error:  # the kind depends on the damage
        raise ValueError(f"{folder}: leaf {path!r} cannot be read: {_line(error)}") from None


def _line(error: Exception) -> str:
    """The library's reason in one line, without the context that it appends in brackets."""
    reason = str(error).strip() or repr(error)
    return re.split(r"\n| \[(?:source locations|tensorstore_spec)", reason)[0][:400]


# ------------------------------------------------------------------------------------- stats


class Stats(NamedTuple):
    """What a look at every entry of a leaf finds.

    Attributes:
      size: the number of entries.
      zeros: how many are exactly zero (-0 and False are). Sparsity is ``zeros / size``.
      norm: the square root of the sum of their squared absolute values; nan if an entry is NaN,
        otherwise inf if one is infinite.
      nan: how many are NaN.
      inf: how many are infinite.
    """

    size: int
    zeros: int
    norm: float
    nan: int
    inf: int


def stats(array: np.ndarray) -> Stats:
    r"""Return the size, zeros, norm and non-finite entries of an array of any dtype.

    $\mathrm{norm} = \sqrt{\sum_i |x_i|^2}$, accumulated in float64 and scaled where the squares
    would overflow or vanish. The array is read in pieces: no copy of it in a wider type is made.

    >>> stats(np.array([3.0, -0.0, 4.0, 0.0], np.float16))
    Stats(size=4, zeros=2, norm=5.0, nan=0, inf=0)
    """
    flat = np.ravel(array)
    wide = np.complex128 if flat.dtype.kind == "c" else np.float64
    zeros, norm, nan, inf = 0, 0.0, 0, 0
    for start in range(0, flat.size, 1 << 16):
        piece = flat[start : start + (1 << 16)].astype(wide)
        piece = np.abs(piece) if wide is np.complex128 else piece
        zeros += piece.size - np.count_nonzero(piece)
        piece_norm = _norm(piece)
        if not math.isfinite(piece_norm):
            nan += int(np.isnan(piece).sum())
            inf += int(np.isinf(piece).sum())
        norm = math.hypot(norm, piece_norm)
    return Stats(flat.size, int(zeros), math.nan if nan else norm, nan, inf)


def _norm(x: np.ndarray) -> float:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        squares = float(np.dot(x, x))
        if 1e-280 < squares < math.inf:
            return math.sqrt(squares)
        peak = float(np.max(np.abs(x)))
        if peak == 0 or not math.isfinite(peak):
            return peak
        return peak * math.sqrt(float(np.dot(x / peak, x / peak)))
