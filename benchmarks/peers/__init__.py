"""Other programs that run the same adapters, and large pools of them: `python -m benchmarks.peers --help`."""
