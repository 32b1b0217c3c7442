"""Layers that both families are built from."""
