"""The frozen encoders: the video codec and the text encoder."""
