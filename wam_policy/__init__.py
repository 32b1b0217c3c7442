"""World Action Models as robot policies: load one from the Hub in one line, wrap any Gymnasium env, fine-tune.

Importing this package costs nothing: its public names load what they need when they are first used.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wam_policy.config import PolicyConfig as PolicyConfig
    from wam_policy.errors import WAMPolicyError as WAMPolicyError
    from wam_policy.policy import WAMPolicy as WAMPolicy

__version__ = "0.1.0"

_PUBLIC = {
    "PolicyConfig": "wam_policy.config",
    "WAMPolicy": "wam_policy.policy",
    "WAMPolicyError": "wam_policy.errors",
}
__all__ = ["PolicyConfig", "WAMPolicy", "WAMPolicyError", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    if name == "WAMPolicy":
        import_module("wam_policy.wrappers")  # registers the env ids
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if (
    "gymnasium" in sys.modules
):  # otherwise `WAMPolicy` or `wam_policy.wrappers` registers the env ids
    from wam_policy.wrappers.envs.registration import register_envs

    register_envs()
