"""Blend LoRA adapters token by token, with a router that is computed, not trained."""

__version__ = "0.1.0"
