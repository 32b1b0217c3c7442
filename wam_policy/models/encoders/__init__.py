"""Frozen encoders: the video codec and the text encoder."""
