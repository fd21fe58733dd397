"""The forward pass of Llama-like models on an NVIDIA GPU, as a CUDA graph."""
