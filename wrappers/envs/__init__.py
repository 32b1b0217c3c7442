"""Simulators as Gymnasium envs, one a file."""
