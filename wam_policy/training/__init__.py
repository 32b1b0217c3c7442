"""Training of policies on recorded datasets."""
