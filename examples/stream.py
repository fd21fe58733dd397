"""Streams from the demo's bundle and prints the weights under which each token was generated."""

import treadle

engine = treadle.load("demo/bundle")
prompt = "Question: Sam has 5 boxes of 6 eggs and drops 4 eggs. How many are left?\n\nAnswer:"
for event in engine.stream(prompt, sampling=treadle.SamplingParams(max_tokens=40)):
    weights = "  ".join(
        f"{name} {weight:.2f}" for name, weight in zip(engine.adapter_names, event.weights, strict=True)
    )
    print(f"{event.text!r:16} {weights}")
