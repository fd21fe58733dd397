"""Runs in vLLM's own environment, by its path: makes calls of vLLM one at a time, for `python -m benchmarks.peers`.

It imports nothing of treadle. The first line of its input is a JSON object with what to load; each further line is a
call, answered by one line: the seconds that the call took and what made it, or an error. Answers come when its threads
are at rest, so that the two processes do not take the cores from each other.
"""

import gc
import json
import os
import sys
import time
from typing import Any

REST_SHARE = 0.1
"""Share of a core below which the process is at rest."""
PAUSE_SECONDS, PATIENCE_SECONDS = 0.05, 2.0
"""Seconds between two looks at that, and after which it answers anyway."""


class Engines:
    """vLLM's engines: `base`, and `lora` that can serve one adapter; each is started by its first call."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._engines: dict[str, Any] = {}

    def call(self, arm: str, prompts: list[list[int]], tokens: int) -> float:
        """Return the seconds of one greedy call that makes `tokens` tokens after each of some prompts."""
        from vllm import SamplingParams  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        engine = self._engines.get(arm) or self._start(arm)
        adapter = LoRARequest("adapter", 1, self._options["adapter"]) if arm == "lora" else None
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=True)
        given = [{"prompt_token_ids": ids} for ids in prompts]
        gc.collect()
        started = time.perf_counter()
        outputs = engine.generate(given, sampling, lora_request=adapter, use_tqdm=False)
        seconds = time.perf_counter() - started
        made = [len(output.outputs[0].token_ids) for output in outputs]
        if made != [tokens] * len(prompts):
            raise RuntimeError(f"vLLM made {made} tokens, not {tokens} a row")
        return seconds

    @property
    def about(self) -> str:
        """Versions, mode and threads."""
        import torch
        import vllm  # type: ignore[import-not-found]

        mode = "eager" if self._options["eager"] else "compiled"
        return f"vLLM {vllm.__version__}, torch {torch.__version__}, {mode}, {torch.get_num_threads()} threads"

    def _start(self, arm: str) -> Any:
        from vllm import LLM  # type: ignore[import-not-found]
        from vllm.platforms import current_platform  # type: ignore[import-not-found]

        options = self._options
        if current_platform.device_type != options["device"]:
            raise RuntimeError(f"this vLLM runs on {current_platform.device_type}, the bench on {options['device']}")
        lora = {"enable_lora": True, "max_lora_rank": options["rank"], "max_loras": 1} if arm == "lora" else {}
        self._engines[arm] = LLM(
            options["model"],
            dtype=options["dtype"],
            enforce_eager=options["eager"],
            max_model_len=options["length"],
            max_num_seqs=options["rows"],
            kv_cache_memory_bytes=options["cache"],
            enable_prefix_caching=False,  # the same prompts come again
            disable_log_stats=True,
            **lora,
        )
        gc.freeze()
        gc.disable()  # as in the other process
        return self._engines[arm]


def rest() -> None:
    """Wait until threads that spin after a call have gone to sleep."""
    end = time.perf_counter() + PATIENCE_SECONDS
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(PAUSE_SECONDS)
        if time.process_time() - before < REST_SHARE * PAUSE_SECONDS:
            return


def main() -> None:
    """Answer calls until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    engines = Engines(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        try:
            seconds = engines.call(**json.loads(line))
            answer: dict[str, Any] = {"seconds": seconds, "about": engines.about}
        except Exception as error:  # the errors of vLLM have no narrower base in common
            said = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {said[0] if said else ''}"}
        rest()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
