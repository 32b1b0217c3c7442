"""Utilities for files, compilation, the runtime environment and deprecated names."""
