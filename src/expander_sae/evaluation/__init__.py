"""Evaluation: every metric, defined once."""
