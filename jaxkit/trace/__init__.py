"""What any apply function does with its leaves, read off its jaxpr."""

from jaxkit.trace.apply import check, permute, take
from jaxkit.trace.axes import Unfollowed, axes, unfollowed
from jaxkit.trace.names import Axis, Concat, Prod, named, rename, resolve
from jaxkit.trace.roles import Role, roles

__all__ = [
    "Axis",
    "Concat",
    "Prod",
    "Role",
    "Unfollowed",
    "axes",
    "check",
    "named",
    "permute",
    "rename",
    "resolve",
    "roles",
    "take",
    "unfollowed",
]
