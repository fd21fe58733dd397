"""Generates, streams and scores with blended adapters: sequences, batches and the key-value cache."""
