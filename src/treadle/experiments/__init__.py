"""Trains adapters, evaluates and measures them: data, tasks, results, figures and timings."""
