"""LoRA adapters: their files, the layers that blend them, and what fits what."""
