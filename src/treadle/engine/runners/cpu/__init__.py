"""The forward passes of Llama-like models on a CPU."""
