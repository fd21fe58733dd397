"""Other programs that run the same adapters, to be measured beside treadle."""
