"""What any apply function does with its leaves, read off its jaxpr."""

from jaxkit.trace.apply import check, permute, take
from jaxkit.trace.axes import Unfollowed, axes, unfollowed
from jaxkit.trace.blocks import Block, assemble, blocks
from jaxkit.trace.names import Axis, Concat, Prod, named, rename, resolve
from jaxkit.trace.reads import Read, reads
from jaxkit.trace.roles import Role, roles
from jaxkit.trace.taps import Op, Tap, replay, taps

__all__ = [
    "Axis",
    "Block",
    "Concat",
    "Op",
    "Prod",
    "Read",
    "Role",
    "Tap",
    "Unfollowed",
    "assemble",
    "axes",
    "blocks",
    "check",
    "named",
    "permute",
    "reads",
    "rename",
    "replay",
    "resolve",
    "roles",
    "take",
    "taps",
    "unfollowed",
]
