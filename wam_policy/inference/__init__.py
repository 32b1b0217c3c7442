"""Compiled inference: the same policy with a faster forward pass."""

from wam_policy.inference.compile import compile_inference

__all__ = ["compile_inference"]
