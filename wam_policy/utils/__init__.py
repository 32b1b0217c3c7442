"""Files, the compiler and the environment: what every other package may use."""
