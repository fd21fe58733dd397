"""The forward passes that the engine can take."""
