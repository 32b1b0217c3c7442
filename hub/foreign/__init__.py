"""Checkpoints of other projects: identification, renaming of tensors, and configurations."""
