"""A chat in vLLM is routed on what its messages say, as in the embedded engine, whatever template renders it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from treadle.engine.chat import TokenPrompt, read_prompt

from vllm_plugin.engines import agree, reference, serving

CHATS = [
    [{"role": "user", "content": "add three plus four"}],
    [
        {"role": "system", "content": "the atom"},
        {"role": "user", "content": "heat of a planet"},
        {"role": "assistant", "content": "cell"},
        {"role": "user", "content": "def loop return list"},
    ],
]
TEMPLATE = "{% for m in messages %}{{ m.role }} def loop list: {{ m.content | trim }}\n{% endfor %}return the list\n"


def test_chats_are_the_embedded_engines(small: Path, embedded: Any) -> None:
    from vllm import SamplingParams

    own = embedded.tokenizer.chat_template
    with serving(small) as served:
        for template in (own, TEMPLATE):
            embedded.tokenizer.chat_template = template
            prompts = [read_prompt(embedded.tokenizer, messages) for messages in CHATS]
            embedded.tokenizer.chat_template = own
            for options in ({}, {"prefill": "causal", "every": 4}):
                extra = {"treadle": options}
                params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3, extra_args=extra)
                routing = replace(embedded.router.params, **options)
                outputs = served.llm.chat(CHATS, params, chat_template=template, use_tqdm=False)
                assert [list(each.prompt_token_ids) for each in outputs] == [list(each.ids) for each in prompts]
                expected = reference(embedded, prompts, routing, tokens=24)
                assert agree(outputs, expected) == []
                as_texts = reference(embedded, [TokenPrompt(each.ids) for each in prompts], routing, tokens=24)
                assert as_texts != expected  # the template's words would have told
