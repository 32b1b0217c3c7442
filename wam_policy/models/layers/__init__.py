"""The parts that both families are made of."""
