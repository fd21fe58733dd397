"""Servers over the engine: the OpenAI-compatible server, and the plugin inside vLLM."""
