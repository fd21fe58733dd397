"""Token-level blending inside vLLM: a plugin beside a stock vLLM, configured by a bundle.

    --additional-config '{"treadle": {"bundle": "demo/bundle"}}'        or        TREADLE_VLLM=demo/bundle

These modules import no vLLM: `params` (the options), `mixture` (the bundle's adapters in slots), `requests` (what
requests ask for), `schedule` (the weights of every token), `live` (adapters that come and go), `shards` and `stacks`
(the factors beside the layers). `support` says which vLLM fits. `hooks` and `engine_hooks` wrap its functions, `attach`
lays the stacks beside its layers, `cpu` uses its kernels, `endpoints` and `figures` add routes to its server.
`selftest` compares a whole engine with the plain formula.
"""


def register() -> None:
    """Install the hooks; vLLM calls this entry point (`vllm.general_plugins`) in every process."""
    from treadle.serving.vllm.hooks import install

    install()
