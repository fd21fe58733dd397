"""A mixture that changes: what keys of cached blocks mean, which names may join, and whether a router remains."""

from pathlib import Path

import pytest

from treadle.bundle.bundle import save_bundle
from treadle.common.errors import AdapterError, BundleError, OptionError
from treadle.common.params import Combine, RoutingParams
from treadle.routing.embedder import StaticEmbedder
from treadle.routing.fitting import fit
from treadle.routing.router import Router
from treadle.serving.vllm.mixture import (
    Mixture,
    check_name,
    open_bundle,
    read_newcomer,
    with_adapter,
    without_adapter,
)
from treadle.serving.vllm.params import PluginParams
from treadle.serving.vllm.schedule import Schedule

from conftest import BASE, SAMPLES, save_adapter

IDS = list(range(64))


@pytest.fixture(scope="module")
def mixture(bundle_folder: Path) -> Mixture:
    return open_bundle(PluginParams(bundle=str(bundle_folder), max_adapters=4))[1]


def key_of(mixture: Mixture, given, tokenizer) -> bytes | None:
    """Return the key that a block's hash contains besides its tokens."""
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


@pytest.mark.parametrize("combine", ["linear", "paper"])
def test_combines_other_than_sum_are_refused_with_the_way_out(
    mixture: Mixture, equal_folders: dict[str, Path], embedder: StaticEmbedder, tmp_path: Path, combine: Combine
) -> None:
    way_out = rf"combine '{combine}': vLLM blends by combine 'sum' only; use sum, or the embedded engine"
    for given in ({"combine": combine}, {"fixed": {"math": 1.0}, "combine": combine}):
        with pytest.raises(OptionError, match=way_out):
            mixture.read_request(given)
    router = fit(SAMPLES, embedder, RoutingParams(score="cosine", rule="boosted", combine=combine))
    bundle = save_bundle(tmp_path / combine, base=BASE, adapters=equal_folders, router=router)
    with pytest.raises(BundleError, match=rf"its default routing has {way_out}"):
        open_bundle(PluginParams(bundle=str(bundle)))


def test_an_adapter_that_does_more_than_add_factors_is_refused_by_name(
    mixture: Mixture, adapter_folders: dict[str, Path], router: Router, tmp_path: Path
) -> None:
    dora = save_adapter(tmp_path / "dora", use_dora=True)
    bundle = save_bundle(tmp_path / "mixed", base=BASE, adapters=adapter_folders | {"code": dora}, router=router)
    message = (
        r"adapter 'code' scales or shifts outputs of 4 modules \(DoRA, IA3, bias\); the layers in vLLM add factors"
    )
    with pytest.raises(BundleError, match=message):
        open_bundle(PluginParams(bundle=str(bundle)))
    with pytest.raises(AdapterError, match=message.replace("code", "poetry")):
        read_newcomer(mixture, PluginParams(bundle="x", max_adapters=4), BASE, "poetry", str(dora), ["loop"])


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


def test_one_sample_an_adapter_is_enough_for_those_that_remain(
    adapter_folders: dict[str, Path], embedder: StaticEmbedder, tmp_path: Path
) -> None:
    samples = {name: texts[:1] for name, texts in SAMPLES.items()}
    bundle = save_bundle(tmp_path / "few", base=BASE, adapters=adapter_folders, router=fit(samples, embedder))
    mixture = open_bundle(PluginParams(bundle=str(bundle), max_adapters=4))[1]
    alone = without_adapter(without_adapter(mixture, "code"), "math")
    assert alone.names == ("science",)
    with pytest.raises(AdapterError, match="'science' is the last one"):
        without_adapter(alone, "science")
