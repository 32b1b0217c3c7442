"""The compiled inference entry point: the same policy, faster."""

from wam_policy.inference.compile import compile_inference

__all__ = ["compile_inference"]
