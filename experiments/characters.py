"""Text, and a small model of its next character that the experiments train.

The text is the documentation that CPython carries (``pydoc_data``), another one with every version
of Python, or the ``.txt`` files of a folder.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

BLOCK = 1000


class Text(NamedTuple):
    """A text as numbers of characters, the most frequent first and the last for all rare ones."""

    name: str
    classes: int
    train: Int[np.ndarray, " n"]
    test: Int[np.ndarray, " m"]


def load(folder: Path | None = None, *, classes: int = 48) -> Text:
    """Load a text in lower case, with single spaces; every tenth block of it is for testing.

    Raises:
      ValueError: no ``.txt`` file in `folder`, or too little text.
      OSError, UnicodeError: a file that cannot be read.
    """
    if folder is None:
        from pydoc_data.topics import topics

        name, text = "CPython's documentation", " ".join(topics[key] for key in sorted(topics))
    else:
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise ValueError(f"{folder} holds no .txt file")
        name, text = folder.name, " ".join(file.read_text(encoding="utf-8") for file in files)
    text = " ".join(text.lower().split())
    if len(text) < 20 * BLOCK:
        raise ValueError(f"{name}: {len(text)} characters, and {20 * BLOCK} or more are due")
    common = [character for character, _ in Counter(text).most_common(classes - 1)]
    number = {character: i for i, character in enumerate(common)}
    numbers = np.array([number.get(c, len(common)) for c in text], np.int32)
    blocks = numbers[: len(numbers) // BLOCK * BLOCK].reshape(-1, BLOCK)
    held = np.arange(len(blocks)) % 10 == 9
    return Text(name, len(common) + 1, blocks[~held].ravel(), blocks[held].ravel())


def fingerprint(text: Text) -> str:
    """Return a hash of the values of a text."""
    head = repr((text.name, text.classes)).encode()
    return hashlib.sha256(head + text.train.tobytes() + text.test.tobytes()).hexdigest()[:16]


def windows(
    text: Int[np.ndarray, " n"], context: int
) -> tuple[Int[np.ndarray, "m context"], Int[np.ndarray, " m"]]:
    """Return the characters before each place of a text, and the one there.

    >>> before, here = windows(np.arange(5), 2)
    >>> before.tolist(), here.tolist()
    ([[0, 1], [1, 2], [2, 3]], [2, 3, 4])
    """
    every = np.lib.stride_tricks.sliding_window_view(text, context + 1)
    return every[:, :-1], every[:, -1]


def init(key: PRNGKeyArray, classes: int, context: int, embed: int, width: int) -> PyTree:
    """Return the weights of a perceptron with one hidden layer on embedded characters."""
    lecun, he = jax.nn.initializers.lecun_normal(), jax.nn.initializers.he_normal()
    keys = jax.random.split(key, 3)
    return {
        "embed": jax.random.normal(keys[0], (classes, embed)),
        "hidden": {"kernel": he(keys[1], (context * embed, width)), "bias": jnp.zeros(width)},
        "head": {"kernel": lecun(keys[2], (width, classes)), "bias": jnp.zeros(classes)},
    }


def logits(params: PyTree, before: Int[Array, "n context"]) -> Float[Array, "n classes"]:
    """Score every character as the next one."""
    x = params["embed"][before].reshape(len(before), -1)
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]
