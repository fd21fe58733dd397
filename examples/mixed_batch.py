"""Rows with different routing share one batch: routed, one adapter, a fixed mixture, the base alone."""

import treadle
from treadle import RoutingParams

engine = treadle.load("demo/bundle")
prompt = "Question: Write a Python function that adds two numbers.\n\nAnswer:"
routings = {
    "routed": engine.router.params,
    "code alone": RoutingParams.one("code"),
    "a fixed mixture": RoutingParams(rule="fixed", fixed={"code": 0.6, "math": 0.4}),
    "the base": RoutingParams.base(),
}
sampling = treadle.SamplingParams(max_tokens=48)
for name, done in zip(
    routings, engine.generate([prompt] * len(routings), sampling=sampling, routing=list(routings.values())), strict=True
):
    print(f"--- {name}: mean weights {done.weights.mean(0).round(2)}\n{done.text}")
