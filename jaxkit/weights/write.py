"""Write a safetensors checkpoint leaf by leaf: it appears under its name when it is complete."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkit.weights.files import SAFETENSORS_DTYPES

__all__ = ["Spec", "writing"]

_CODES = {np.dtype(dtype): code for code, dtype in SAFETENSORS_DTYPES.items()}


class Spec(NamedTuple):
    """What a leaf to be written will be."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@contextmanager
def writing(
    path: str | os.PathLike[str],
    specs: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Open a checkpoint for writing, and yield ``put(path, array)`` for its leaves in any order.

    The data go to hidden files beside `path`. At the end of the block, if every leaf is there, the
    files get their names; after an error they are removed, and what stood at `path` is untouched.
    Nothing is kept in memory.

    Args:
      path: a ``.safetensors`` file, or a ``.safetensors.index.json``: then the leaves go into
        shards beside it.
      specs: (shape, dtype) of every leaf by path.
      metadata: strings by string, into the header of every file.
      shard_bytes: the size at which a shard is full.
      overwrite: replace what is at `path`.

    Raises:
      FileExistsError: there is something at `path`.
      ValueError: another suffix, a dtype that the format has not, a leaf that was not put, or that
        is not what its spec said.

    >>> import tempfile
    >>> from jaxkit.weights import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with writing(f"{folder}/a.safetensors", {"w": ((2,), np.dtype("f4"))}) as put:
    ...         put("w", np.array([1, 2], np.float32))
    ...     files.leaves(f"{folder}/a.safetensors")["w"].read().tolist()
    [1.0, 2.0]
    """
    path = Path(path)
    if not path.name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"{path}: .safetensors or .safetensors.index.json is due at its end")
    for name, (_, dtype) in specs.items():
        if np.dtype(dtype) not in _CODES:
            raise ValueError(f"{path}: leaf {name!r} has dtype {dtype}, unknown to safetensors")
    # wide entries first, so that every array starts at a multiple of its entries' size
    ordered = sorted(specs.items(), key=lambda item: -np.dtype(item[1][1]).itemsize)
    due = {name: Spec(*spec) for name, spec in ordered}
    shards = {path.name: due}
    if path.suffix == ".json":
        shards = _shards(path.name.removesuffix(".safetensors.index.json"), due, shard_bytes)
    targets = {path, *(path.parent / name for name in shards)}
    if not overwrite and (there := [t for t in targets if t.exists()]):
        raise FileExistsError(f"{there[0]}: there is such a file already")
    hidden = lambda name: path.parent / f".{name}.{os.getpid()}.partial"
    places, missing = {}, set(due)
    with ExitStack() as stack:
        for name in {*shards, path.name}:
            stack.callback(hidden(name).unlink, missing_ok=True)
        files = {name: stack.enter_context(hidden(name).open("wb")) for name in shards}
        for shard, held in shards.items():
            start = files[shard].write(_header(held, metadata or {}))
            for name, spec in held.items():
                places[name] = (files[shard], start)
                start += spec.bytes

        def put(name: str, array: np.ndarray) -> None:
            shape, dtype = due[name]
            if array.shape != tuple(shape) or array.dtype != dtype:
                raise ValueError(
                    f"{path}: leaf {name!r} is {array.dtype}{list(array.shape)}, "
                    f"and {dtype}{list(shape)} was due"
                )
            file, start = places[name]
            file.seek(start)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            missing.discard(name)

        yield put
        if missing:
            raise ValueError(f"{path}: leaf {min(missing)!r} was never written")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if path.suffix == ".json":
            table = {
                "metadata": {"total_size": sum(spec.bytes for spec in due.values())},
                "weight_map": {name: shard for shard, held in shards.items() for name in held},
            }
            hidden(path.name).write_text(json.dumps(table, indent=2))
        for name in dict.fromkeys([*shards, path.name]):
            os.replace(hidden(name), path.parent / name)


def _shards(stem: str, specs: Mapping[str, Spec], most: int) -> dict[str, dict[str, Spec]]:
    groups, size = [{}], 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.bytes > most:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.bytes
    n = len(groups)
    return {f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors": held for i, held in enumerate(groups)}


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    entries: dict = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, spec in specs.items():
        end = start + spec.bytes
        code = _CODES[np.dtype(spec.dtype)]
        entries[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return len(text).to_bytes(8, "little") + text
