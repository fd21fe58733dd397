"""Blends adapters on a model that you loaded yourself, without an engine: weights in, logits out.

python examples/own_model.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import treadle
from treadle.bundle.base_model import locate

base = locate("HuggingFaceTB/SmolLM2-135M-Instruct")
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(base)
adapters = [treadle.read_adapter(f"demo/bundle/adapters/{name}") for name in ("math", "code")]

ids = tokenizer("Question: What is 3 + 4?\n\nAnswer:", return_tensors="pt").input_ids
blend = treadle.attach(model, adapters)
for weights in (None, [1.0, 0.0], [0.5, 0.5]):
    with torch.inference_mode(), blend.using(weights):
        token = model(ids).logits[0, -1].argmax()
    print(weights, repr(tokenizer.decode(token)))
blend.detach()  # the model is as it was
