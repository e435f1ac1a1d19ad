"""Speed and memory against the peers, on the same inputs in the same process: ``python -m benchmarks``."""
