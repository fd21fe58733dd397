"""Measures other programs that run the same adapters, and large pools: `python -m benchmarks.peers --help`."""
