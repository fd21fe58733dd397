"""A mixture that changes: what keys of cached blocks mean, which names may join, and whether a router remains."""

from pathlib import Path

import pytest

from treadle.bundle.bundle import save_bundle
from treadle.common.errors import AdapterError, OptionError, TreadleError
from treadle.common.params import RoutingParams
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.router import fit
from treadle.serving.vllm.joining import check_name, read_newcomer, with_adapter, without_adapter
from treadle.serving.vllm.mixture import Mixture, open_bundle
from treadle.serving.vllm.params import PluginParams
from treadle.serving.vllm.schedule import Schedule

from conftest import BASE, SAMPLES

IDS = list(range(64))


@pytest.fixture(scope="module")
def mixture(bundle_folder: Path) -> Mixture:
    return open_bundle(PluginParams(bundle=str(bundle_folder), max_adapters=4))[1]


def key_of(mixture: Mixture, given, tokenizer) -> bytes | None:
    """What a block's hash contains besides its tokens."""
    schedule = Schedule(mixture, tokenizer)
    stream = schedule.open(given, len(IDS))
    schedule.decide([(stream, IDS, len(IDS))])
    return stream.key(0, 16)


def rejoin(mixture: Mixture, name: str, folder: Path) -> Mixture:
    """Take an adapter out and put it back into the slot that it had."""
    slot = mixture.slots[mixture.names.index(name)]
    newcomer = read_newcomer(
        without_adapter(mixture, name), PluginParams(bundle="b"), BASE, name, str(folder), SAMPLES[name]
    )
    return with_adapter(without_adapter(mixture, name), newcomer, slot)


def test_keys_of_adapters_in_another_order_are_not_taken_for_each_other(
    mixture: Mixture, adapter_folders: dict[str, Path], tokenizer
) -> None:
    again = rejoin(mixture, "math", adapter_folders["math"])
    assert again.names == ("science", "code", "math")
    assert dict(zip(again.names, again.slots, strict=True)) == dict(zip(mixture.names, mixture.slots, strict=True))
    before = {name: key_of(mixture, name, tokenizer) for name in mixture.names}
    after = {name: key_of(again, name, tokenizer) for name in mixture.names}
    # weights are in the order of N: science's are now what math's were
    clashes = [(one, two) for one in before for two in after if one != two and before[one] == after[two]]
    assert clashes == []
    whole = rejoin(again, "science", adapter_folders["science"])
    whole = rejoin(whole, "code", adapter_folders["code"])
    whole = rejoin(whole, "math", adapter_folders["math"])
    assert whole.names == again.names
    assert whole.fingerprint == again.fingerprint  # the same order again: what is cached may be used


def paper_bundle(folder: Path, adapters: dict[str, Path], embedder: StaticEmbedder) -> Path:
    router = fit(SAMPLES, embedder, RoutingParams(score="cosine", rule="boosted", combine="paper"))
    return save_bundle(folder, base=BASE, adapters=adapters, router=router)


def test_base_and_one_adapter_may_be_asked_for_whatever_the_bundle_combines(
    equal_folders: dict[str, Path], embedder: StaticEmbedder, tmp_path: Path
) -> None:
    bundle = paper_bundle(tmp_path / "paper", equal_folders, embedder)
    mixture = open_bundle(PluginParams(bundle=str(bundle)))[1]
    assert mixture.combines == ("sum", "paper")
    assert mixture.read_request(None).combine == "paper"
    assert mixture.read_request("base") == RoutingParams.base()
    assert mixture.read_request("math") == RoutingParams.one("math")
    with pytest.raises(OptionError, match="'linear' was not asked for"):
        mixture.read_request({"combine": "linear"})


@pytest.mark.parametrize("name", ["math", "base", "auto", "every", "a b", "../x", "{", "", "x" * 200, "demo"])
def test_names_that_would_be_mistaken_cannot_join(
    mixture: Mixture, adapter_folders: dict[str, Path], name: str
) -> None:
    with pytest.raises(AdapterError, match=r"adapter name|exists already"):
        check_name(name, (*mixture.names, "demo"))
    if name != "demo":
        folder = str(adapter_folders["math"])
        with pytest.raises(AdapterError):
            read_newcomer(mixture, PluginParams(bundle="b"), BASE, name, folder, SAMPLES["math"])


def test_a_name_that_is_a_name_may_join(mixture: Mixture) -> None:
    check_name("late-2.1_b", mixture.names)


def test_fields_come_before_adapters_of_their_name(
    adapter_folders: dict[str, Path], embedder: StaticEmbedder, tmp_path: Path
) -> None:
    router = fit({"every": SAMPLES["math"], "code": SAMPLES["code"]}, embedder)
    adapters = {"every": adapter_folders["math"], "code": adapter_folders["code"]}
    bundle = save_bundle(tmp_path / "named", base=BASE, adapters=adapters, router=router)
    mixture = open_bundle(PluginParams(bundle=str(bundle)))[1]
    assert mixture.read_request({"every": 8}) == RoutingParams(every=8)
    assert mixture.read_request("every") == RoutingParams.one("every")
    assert mixture.read_request({"fixed": {"every": 8}}).fixed == {"every": 8.0}


def test_a_router_that_could_not_decide_does_not_remain(
    adapter_folders: dict[str, Path], embedder: StaticEmbedder, tmp_path: Path
) -> None:
    samples = {"math": SAMPLES["math"], "code": SAMPLES["code"][:1], "science": SAMPLES["science"][:1]}
    router = fit(samples, embedder, RoutingParams(score="lda"))
    bundle = save_bundle(tmp_path / "few", base=BASE, adapters=adapter_folders, router=router)
    mixture = open_bundle(PluginParams(bundle=str(bundle), max_adapters=4))[1]
    smaller = without_adapter(mixture, "code")  # math's samples are enough for all
    with pytest.raises(TreadleError, match=r"(?s)without 'math'.*samples"):
        without_adapter(smaller, "math")
