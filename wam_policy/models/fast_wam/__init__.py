"""Fast-WAM."""
