"""Light-WAM."""
