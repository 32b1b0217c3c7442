"""Evaluation of policies in simulators: rollouts, results, comparisons and videos."""
