"""Lines: bounded, fair between keys and hosts, left when the client goes; and what requests make a server hold."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from treadle.serving.openai.failures import Failure
from treadle.serving.openai.middleware import Uploads
from treadle.serving.openai.params import ServeParams
from treadle.serving.openai.queues import SMALL_WORK_BYTES, Check, Client, FairOrder, QueuedWork, WorkQueue
from treadle.serving.openai.tokens import MinTokenCount

MIB = 1 << 20


def order(*clients: Client) -> list[str]:
    """Return whose turn it is, of tickets that came in this order."""
    turns = FairOrder()
    for client in clients:
        turns.add(QueuedWork(lambda _: None, client))
    return [f"{ticket.client.key}{ticket.client.host}" for ticket in iter(turns.take, None)]


def test_keys_take_turns_and_the_hosts_of_a_key_do() -> None:
    many, other, few = Client("a", "1"), Client("a", "2"), Client("b", "1")
    assert order(many, many, many, many, other, few, few) == ["a1", "b1", "a2", "b1", "a1", "a1", "a1"]


class Held:
    """A line whose work waits until it may go on, and notes in which order it was done."""

    def __init__(self, line: WorkQueue) -> None:
        self.line = line
        self.go = threading.Event()
        self.begun = threading.Event()
        self.done: list[str] = []

    def hold(self, check: Check) -> None:
        self.begun.set()
        self.go.wait(20)
        check()
        self.done.append("held")

    def run(self, name: str, client: Client, num_bytes: int = 0) -> "asyncio.Task[None]":
        return asyncio.ensure_future(self.line.run(lambda _: self.done.append(name), client, num_bytes))

    async def begin(self, client: Client, num_bytes: int) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(self.line.run(self.hold, client, num_bytes))
        assert await asyncio.to_thread(self.begun.wait, 20)
        return task


def with_line(scenario: Callable[[Held], Coroutine[Any, Any, None]], **options: int) -> list[str]:
    line = WorkQueue("test", **options)
    held = Held(line)
    try:
        asyncio.run(scenario(held))
    finally:
        held.go.set()
        line.close()
        assert line.has_ended(20)
    return held.done


def test_small_work_does_not_wait_for_large() -> None:
    async def scenario(held: Held) -> None:
        large = await held.begin(Client("a"), SMALL_WORK_BYTES + 1)
        more = [held.run("large", Client("a"), SMALL_WORK_BYTES + 1) for _ in range(5)]
        await asyncio.wait_for(held.run("small", Client("b"), SMALL_WORK_BYTES), 20)
        assert held.done == ["small"]
        held.go.set()
        await asyncio.gather(large, *more)

    assert with_line(scenario) == ["small", "held", *["large"] * 5]


def test_work_whose_client_goes_is_not_begun_and_what_runs_is_told() -> None:
    async def scenario(held: Held) -> None:
        first = await held.begin(Client("a"), 0)
        second, third = held.run("abandoned", Client("a")), held.run("wanted", Client("a"))
        await asyncio.sleep(0)
        first.cancel()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        held.go.set()
        await third

    assert with_line(scenario, num_threads=1) == ["wanted"]


def test_where_a_line_is_full_whoever_has_most_in_it_is_refused() -> None:
    async def scenario(held: Held) -> None:
        first = await held.begin(Client("a"), 0)
        flood = [held.run(f"a{number}", Client("a")) for number in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(Failure, match="too many requests") as refused:
            await held.run("a4", Client("a"))
        assert (refused.value.status, refused.value.retry) == (429, 5)
        other = held.run("b", Client("b"))
        with pytest.raises(Failure):
            await flood[-1]  # it gave up its place
        held.go.set()
        await asyncio.gather(first, other, *flood[:-1])

    assert with_line(scenario, num_threads=1, most=4) == ["held", "a0", "b", "a1", "a2"]


def test_a_line_that_is_closed_tells_whoever_waits() -> None:
    async def scenario(held: Held) -> None:
        first = await held.begin(Client("a"), 0)
        second = held.run("late", Client("a"))
        await asyncio.sleep(0)
        held.line.close()
        for task in (second, held.run("later", Client("a"))):
            with pytest.raises(Failure, match="shutting down") as refused:
                await task
            assert refused.value.status == 503
        assert not held.line.has_ended(0)
        held.go.set()
        with pytest.raises(Failure, match="shutting down"):
            await first

    assert with_line(scenario, num_threads=1) == []


def test_long_bodies_share_a_budget_and_short_ones_need_none() -> None:
    uploads = Uploads(ServeParams(max_body=4 * MIB))
    greedy = [uploads.start(Client("a")) for _ in range(17)]
    for upload in greedy[:16]:
        upload.hold(4 * MIB)
    with pytest.raises(Failure, match="too many long bodies") as refused:
        greedy[16].hold(4 * MIB)  # more than half of all
    assert refused.value.status == 429
    greedy[16].hold(64 << 10)
    others = [uploads.start(Client("", f"host{number}")) for number in range(16)]
    for upload in others:
        upload.hold(4 * MIB)
    with pytest.raises(Failure):
        uploads.start(Client("b")).hold(4 * MIB)
    with greedy[0]:
        pass  # it has been read
    uploads.start(Client("b")).hold(4 * MIB)


TEXTS = [
    "",
    "x",
    "the planet  heat\n\n",
    "\U0001f600" * 50,
    "日本語" * 20,
    " " * 300,
    "<unused><pad>" * 9,
    "e\u0301" * 40,
]


def test_a_text_has_at_least_as_many_tokens_as_said(tokenizer: PreTrainedTokenizerFast) -> None:
    fewest = MinTokenCount(tokenizer)
    for text in TEXTS:
        assert fewest(text) <= len(tokenizer(text).input_ids)
    assert fewest("x" * 500) == 500


def bpe(**options: object) -> PreTrainedTokenizerFast:
    """Return a trained tokenizer whose parts may be replaced."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(byte_fallback=bool(options.get("byte_fallback")), unk_token="<unk>", fuse_unk=True))
    core.normalizer = options.get("normalizer") or normalizers.Replace(" ", "\u2581")
    core.pre_tokenizer = options.get("pre_tokenizer") or pre_tokenizers.Metaspace()
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    core.train_from_iterator(["the planet heat " * 3, "hot hot planets", "é e\u0301 日本"], trainer)
    if options.get("eats_space"):
        core.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("kind", ["fallback", "nfc", "no fallback", "strips", "eats_space", "splits"])
def test_no_tokenizer_is_said_to_make_more_tokens_than_it_does(kind: str) -> None:
    from tokenizers import normalizers, pre_tokenizers

    made: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
        "fallback": partial(bpe, byte_fallback=True),
        "nfc": partial(bpe, byte_fallback=True, normalizer=normalizers.NFC()),
        "no fallback": bpe,
        "strips": partial(bpe, byte_fallback=True, normalizer=normalizers.Strip()),
        "eats_space": partial(bpe, byte_fallback=True, eats_space=True),
        "splits": partial(bpe, byte_fallback=True, pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    }
    tokenizer = made[kind]()
    fewest = MinTokenCount(tokenizer)
    texts = [*TEXTS, " " * 900 + "<mask>", "\u1112\u1161\u11ab" * 99, "the planet heat " * 50, "\U0001f600" * 900]
    for text in texts:
        assert fewest(text) <= len(tokenizer(text).input_ids)
    assert bool(fewest("the planet " * 900)) == (kind in ("fallback", "nfc"))


def test_tokenizers_serve_several_threads_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the planet heat " * 200
    expected = tokenizer(text).input_ids
    with ThreadPoolExecutor(4) as pool:
        assert all(ids == expected for ids in pool.map(lambda _: tokenizer(text).input_ids, range(40)))
