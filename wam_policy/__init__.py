"""World Action Models as robot policies: load one from the Hub, wrap a Gymnasium env, fine-tune.

The import of this package is cheap: its public names load their modules on first use.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wam_policy.config import PolicyConfig as PolicyConfig
    from wam_policy.errors import WAMPolicyError as WAMPolicyError
    from wam_policy.policy import WAMPolicy as WAMPolicy

__version__ = "0.1.0"

# Public name -> module that defines it.
_LAZY_IMPORTS = {
    "PolicyConfig": "wam_policy.config",
    "WAMPolicy": "wam_policy.policy",
    "WAMPolicyError": "wam_policy.errors",
}
__all__ = ["PolicyConfig", "WAMPolicy", "WAMPolicyError", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY_IMPORTS[name]), name)
    if name == "WAMPolicy":
        # Importing the wrappers registers the env ids with Gymnasium.
        import_module("wam_policy.wrappers")
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# Register the env ids at once only if Gymnasium is loaded already: importing it here would be slow.
# Otherwise the first use of `WAMPolicy` or `wam_policy.wrappers` registers them.
if "gymnasium" in sys.modules:
    from wam_policy.wrappers.envs.registration import register_envs

    register_envs()
