"""Measurements of what a control step costs: time, operations and memory."""
