"""Datasets: reading, writing, recording, cutting into windows, encoding."""
