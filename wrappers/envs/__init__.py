"""Simulators as Gymnasium envs, one per module."""
