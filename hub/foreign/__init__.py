"""Checkpoints of other projects: recognised, renamed, and given a contract."""
