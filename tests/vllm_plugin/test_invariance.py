"""Whatever vLLM does with a request, its text is that of the embedded engine."""

from pathlib import Path
from typing import Any

import pytest

from treadle.common.params import RoutingParams
from treadle.serving.vllm.request_weights import RequestWeights

from vllm_plugin.engines import ADAPTERS, PROMPTS, agree, reference, serving

MODES: dict[str, tuple[Any, RoutingParams | None]] = {
    "auto": (None, None),
    "every 2": ({"every": 2}, RoutingParams(score="centred", temperature=0.3, every=2)),
    "causal": ({"prefill": "causal", "every": 4},
               RoutingParams(score="centred", temperature=0.3, every=4, prefill="causal")),
    "prompt": ({"every": None}, RoutingParams(score="centred", temperature=0.3, every=None)),
    "window": ({"window": 6},
               RoutingParams(score="centred", temperature=0.3, every=1, window=6)),
    "fixed": ({"math": 0.7, "code": 1.3}, RoutingParams(rule="fixed", fixed={"math": 0.7, "code": 1.3}, every=None)),
    "one": ("science", RoutingParams.one("science")),
    "base": ("base", RoutingParams.base()),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(embedded: Any) -> dict[str, list[list[int]]]:
    """The embedded engine's texts of each prompt in each mode."""
    return {name: reference(embedded, PROMPTS, routing) for name, (_, routing) in MODES.items()}


def test_the_modes_differ(expected: dict[str, list[list[int]]]) -> None:
    assert len({str(each) for each in expected.values()}) == len(MODES)


def mixed(expected: dict[str, list[list[int]]]) -> tuple[list[str], list[Any], list[list[int]]]:
    """All prompts in all modes, shuffled so that neighbours in a batch have different ones."""
    entries = [(mode, index) for index in range(len(PROMPTS)) for mode in MODES]
    return (
        [PROMPTS[index] for _, index in entries],
        [MODES[mode][0] for mode, _ in entries],
        [expected[mode][index] for mode, index in entries],
    )


def test_alone_and_in_mixed_batches(small: Path, expected: dict[str, list[list[int]]]) -> None:
    with serving(small) as served:
        assert len(served.core.model_executor.driver_worker.worker.model_runner.get_model().treadle.stacks) == 8
        for mode, (given, _) in MODES.items():
            alone = [served.run([prompt], given)[0] for prompt in PROMPTS[:2]]
            assert agree(alone, expected[mode][:2]) == [], mode
        prompts, given, wanted = mixed(expected)
        assert agree(served.run(prompts, given), wanted) == []


def test_chunks_of_sixteen_tokens(small: Path, expected: dict[str, list[list[int]]]) -> None:
    with serving(small, max_num_batched_tokens=16, max_num_seqs=16) as served:
        prompts, given, wanted = mixed(expected)
        assert agree(served.run(prompts, given), wanted) == []


@pytest.mark.parametrize("cached", [False, True], ids=["no prefix cache", "prefix cache"])
def test_preempted_and_computed_again(small: Path, expected: dict[str, list[list[int]]], cached: bool) -> None:
    with serving(small, num_gpu_blocks_override=10, enable_prefix_caching=cached, max_model_len=192) as served:
        scheduler, count = served.core.scheduler, [0]
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            count[0] += 1
            preempt(*args, **kwargs)

        scheduler._preempt_request = counted
        prompts, given, wanted = mixed(expected)
        assert agree(served.run(prompts, given), wanted) == []
        assert count[0] >= 3


def warm(served: Any, wanted: list[list[int]], given: list[Any]) -> tuple[list[str], list[int]]:
    """Run one prompt under each option in turn, twice over; return differences and the cached tokens of each run."""
    problems: list[str] = []
    cached: list[int] = []
    for _ in range(2):
        for each, ids in zip(given, wanted, strict=True):
            (output,) = served.run([PROMPTS[4]], each)
            problems += agree([output], [ids])
            cached.append(output.num_cached_tokens)
    return problems, cached


class Unkeyed(RequestWeights):
    """Weights that leave no trace in the hash of a block."""

    def key(self, start: int, end: int) -> None:
        return None


def test_the_prefix_cache_knows_the_weights(small: Path, expected: dict[str, list[list[int]]]) -> None:
    given = [MODES[mode][0] for mode in ("auto", "fixed", "one", "base", "causal")]
    wanted = [expected[mode][4] for mode in ("auto", "fixed", "one", "base", "causal")]
    with serving(small) as served:
        problems, cached = warm(served, wanted, given)
        assert problems == []
        assert cached == [0, 0, 0, 0, 0, 64, 64, 64, 64, 64]  # hits, and of one's own kind only
        served.llm.reset_prefix_cache()
        # the control: without weights in the hash the same check must fail
        served.core.scheduler.treadle.schedule.request_type = Unkeyed
        problems, cached = warm(served, wanted, given)
        assert cached[1] > 0
        assert problems != []


def test_blocks_of_generated_tokens_are_found_again(small: Path) -> None:
    """With `causal` a prompt that another request has generated in part has that one's weights and blocks."""
    given = {"prefill": "causal", "every": 16}
    with serving(small) as served:
        (whole,) = served.run([PROMPTS[4]], given, max_tokens=120)
        prompt, answer = list(whole.prompt_token_ids), list(whole.outputs[0].token_ids)
        (again,) = served.run([prompt + answer[:80]], given, max_tokens=40)
        assert again.num_cached_tokens > len(prompt)
        assert agree([again], [answer[80:]]) == []
        # the control: weights of a prompt as a whole are others
        (first,) = served.run([PROMPTS[4]], max_tokens=120)
        (other,) = served.run([prompt + list(first.outputs[0].token_ids)[:80]], max_tokens=40)
        assert other.num_cached_tokens == 0


class Newest(RequestWeights):
    """Weights of which the newest count for all tokens."""

    def gates(self, start: int, end: int) -> Any:
        last = 1 << 30
        return super().gates(last, last + 1)[0], (end - start,)


def test_gates_of_the_newest_token_for_all_would_be_seen(small: Path, expected: dict[str, list[list[int]]]) -> None:
    """The control of the tests above: a preempted text read again under its newest weights differs."""
    with serving(small, num_gpu_blocks_override=10, enable_prefix_caching=False, max_model_len=192) as served:
        served.core.scheduler.treadle.schedule.request_type = Newest
        prompts, given, wanted = mixed(expected)
        assert agree(served.run(prompts, given), wanted) != []


def test_compiled(small: Path, expected: dict[str, list[list[int]]]) -> None:
    with serving(small, enforce_eager=False) as served:
        assert served.llm.llm_engine.vllm_config.compilation_config.mode  # vLLM's default for a CPU; 0 = none
        prompts, given, wanted = mixed(expected)
        assert agree(served.run(prompts, given), wanted) == []


def test_without_a_bundle_nothing_happens(small: Path, expected: dict[str, list[list[int]]]) -> None:
    with serving(None, small.parent / "tiny-llama") as served:
        assert agree(served.run(PROMPTS), expected["base"]) == []
        model = served.core.model_executor.driver_worker.worker.model_runner.get_model()
        assert not hasattr(model, "treadle")
        assert served.core.scheduler.treadle is None
        plain = [each.outputs[0].logprobs for each in served.run(PROMPTS)]
    with serving(small) as served:  # all weights 0: exactly the base's numbers, beside others that are not
        outputs = served.run([*PROMPTS, *PROMPTS], ["base"] * 5 + [None] * 5)
    zero = [each.outputs[0].logprobs for each in outputs[:5]]
    assert [[{k: v.logprob for k, v in at.items()} for at in each] for each in zero] == [
        [{k: v.logprob for k, v in at.items()} for at in each] for each in plain
    ]


def test_every_adapter_acts(small: Path, expected: dict[str, list[list[int]]]) -> None:
    with serving(small) as served:
        texts = [served.ids(PROMPTS[:1], name) for name in (*ADAPTERS, "base")]
        assert len({str(each) for each in texts}) == len(ADAPTERS) + 1
