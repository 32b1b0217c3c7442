"""Checkpoint files on the Hub and on disk; nothing here imports Gymnasium."""
