"""Experiments, one module each: what is run, on what, and how its result is written down."""
