"""What any apply function does with its leaves, read off its jaxpr."""

from jaxkit.trace.apply import check, permute, take
from jaxkit.trace.axes import Unfollowed, axes, unfollowed
from jaxkit.trace.names import Axis, Concat, Prod, named, rename, resolve
from jaxkit.trace.roles import Role, roles
from jaxkit.trace.taps import Op, Tap, replay, taps

__all__ = [
    "Axis",
    "Concat",
    "Op",
    "Prod",
    "Role",
    "Tap",
    "Unfollowed",
    "axes",
    "check",
    "named",
    "permute",
    "rename",
    "replay",
    "resolve",
    "roles",
    "take",
    "taps",
    "unfollowed",
]
