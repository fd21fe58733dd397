"""The OpenAI-compatible server, `treadle serve`: a skin over the engine, for one machine.

Options and the command need no web library; `treadle.serving.openai.serve` loads them.
"""
