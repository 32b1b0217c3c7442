"""Gymnasium wrappers and simulator adapters: numpy in, numpy out, never torch."""

from wam_policy.wrappers.registration import register_envs

register_envs()
