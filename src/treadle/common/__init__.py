"""Errors, options, files and memory, for every other package. Nothing here knows a model or an adapter."""
