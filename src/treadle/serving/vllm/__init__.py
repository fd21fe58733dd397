"""Token-level blending inside vLLM: a plugin beside a stock vLLM, configured by a bundle.

    --additional-config '{"treadle": {"bundle": "demo/bundle"}}'        or        TREADLE_VLLM=demo/bundle

`params` (the options), `mixture` (what a bundle means here), `joining` (adapters that come and go), `schedule` (the
weights of every token) and `stacks` (the factors beside the layers) import no vLLM; `places`, `hooks`, `refusals` and
`cpu` know its insides, `attach` lays the stacks beside its layers, `endpoints` adds routes to its server, `selftest`
compares it with the plain formula.
"""


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every process. Nothing happens without a bundle."""
    from treadle.serving.vllm.hooks import install

    install()
