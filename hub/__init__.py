"""Files of checkpoints: found on the Hub or on disk, read and written strictly; never Gymnasium."""
