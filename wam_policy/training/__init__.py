"""Recording, datasets and training."""
