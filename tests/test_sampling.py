"""Each row is sampled by its own options and its own random stream."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from treadle.common.errors import OptionError
from treadle.common.params import SamplingParams
from treadle.engine.sampling import new_generator, sample, truncate

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CPU = torch.device("cpu")
GREEDY = SamplingParams()


def logits_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def draws(logits: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    """Tokens that one row's stream gives in turn for the same logits (V,)."""
    generator = new_generator(params, CPU)
    return [sample(logits[None], [params], [generator])[0][0] for _ in range(count)]


@given(st.integers(0, 99), st.integers(1, 5))
@quick
def test_greedy_is_the_most_probable_token_and_its_log_probability(seed, rows):
    logits = logits_of(seed, rows, 11)
    tokens, logprobs = sample(logits, [GREEDY] * rows, [None] * rows)
    assert tokens == logits.argmax(-1).tolist()
    assert all(isinstance(token, int) for token in tokens)
    np.testing.assert_allclose(logprobs, torch.log_softmax(logits, -1).max(-1).values, atol=1e-5)


@given(st.integers(0, 99), st.floats(0.2, 3), st.integers(0, 5), st.floats(0.1, 1))
@quick
def test_log_probabilities_are_the_models_own_whatever_the_options(seed, temperature, top_k, top_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    logits = logits_of(seed, 2, 11)
    tokens, logprobs = sample(logits, [params] * 2, [new_generator(params, CPU) for _ in range(2)])
    assert tokens[0] in torch.isfinite(truncate(logits[0] / temperature, params)).nonzero()
    np.testing.assert_allclose(logprobs, torch.log_softmax(logits, -1)[range(2), tokens], atol=1e-5)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.7, 1.5]), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=5)
)
@quick
def test_a_batch_is_its_rows(drawn):
    options = [SamplingParams(temperature=t, top_k=k, seed=seed) for t, k, seed in drawn]
    logits = logits_of(1, len(options), 11)
    together = sample(logits, options, [new_generator(params, CPU) for params in options])
    alone = [
        sample(logits[row : row + 1], [params], [new_generator(params, CPU)]) for row, params in enumerate(options)
    ]
    assert together[0] == [tokens[0] for tokens, _ in alone]
    np.testing.assert_allclose(together[1], [logprobs[0] for _, logprobs in alone], atol=1e-6)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    logits, params = logits_of(0, 50) / 3, SamplingParams(temperature=1.0, seed=5)
    assert draws(logits, params, 20) == draws(logits, params, 20)
    assert draws(logits, params, 20) != draws(logits, SamplingParams(temperature=1.0, seed=6), 20)


def test_without_a_seed_every_stream_is_fresh():
    logits, params = logits_of(0, 50) / 3, SamplingParams(temperature=1.0)
    assert draws(logits, params, 20) != draws(logits, params, 20)


def test_a_greedy_row_needs_no_random_stream():
    assert new_generator(GREEDY, CPU) is None
    assert new_generator(SamplingParams(temperature=0.1), CPU) is not None


def test_tokens_come_as_often_as_their_probability_says():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    tokens = draws(probabilities.log(), SamplingParams(temperature=1.0, seed=0), 2000)
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 2000, probabilities, atol=0.04)
    squared = probabilities**2 / (probabilities**2).sum()
    tokens = draws(probabilities.log(), SamplingParams(temperature=0.5, seed=0), 2000)
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 2000, squared, atol=0.04)


# What top_k and top_p leave out


@given(st.integers(0, 999), st.integers(0, 14))
@quick
def test_top_k_keeps_the_k_most_probable(seed, k):
    logits = logits_of(seed, 11)
    kept = truncate(logits, SamplingParams(temperature=1.0, top_k=k))
    expected = set(sorted(range(11), key=lambda token: -logits[token])[: k or 11])
    assert set(torch.isfinite(kept).nonzero().flatten().tolist()) == expected
    assert torch.equal(kept[sorted(expected)], logits[sorted(expected)])


@given(st.integers(0, 999), st.floats(0.01, 1), st.integers(0, 8))
@quick
def test_top_p_keeps_the_smallest_set_with_that_mass(seed, top_p, k):
    logits = logits_of(seed, 11)
    kept = torch.isfinite(truncate(logits, SamplingParams(temperature=1.0, top_p=top_p, top_k=k)))
    order = logits.argsort(descending=True)
    count = int(kept.sum())
    assert kept[order[:count]].all()  # the most probable ones
    probabilities = torch.softmax(logits[order[: k or 11]].double(), -1)  # of what top_k has left
    mass = probabilities.cumsum(-1)
    assert mass[count - 1] >= top_p - 1e-5
    assert count == 1 or mass[count - 2] < top_p + 1e-5


def test_the_most_probable_token_always_stays():
    logits = torch.tensor([1.0, 3.0, 2.0])
    for params in (SamplingParams(top_p=1e-9), SamplingParams(top_k=1), SamplingParams(top_p=1e-9, top_k=2)):
        assert torch.isfinite(truncate(logits, params)).tolist() == [False, True, False]


EXTREMES = [
    {"top_p": 1e-46},
    {"top_p": 5e-324},
    {"top_p": 1e-46, "top_k": 3},
    {"top_p": 1 - 1e-16},
    {"temperature": 1e-3},
    {"temperature": 1e-3, "top_p": 1e-46},
    {"temperature": 1e308},
    {"temperature": 1e308, "top_p": 1e-46},
    {"temperature": 1e308, "top_k": 2},
    {"top_k": 10**30},
    {"seed": 2**63 - 1},
    {"temperature": -0.0, "top_p": 1e-46},
]
LOGITS = {
    "usual": [1.0, 3.0, 2.0, -1.0],
    "ties": [2.0, 2.0, 2.0, 2.0],
    "large": [3e38, -3e38, 3e38, 0.0],
    "left out by the model": [-torch.inf, 1.0, -torch.inf, 0.0],
    "one token": [-torch.inf, -torch.inf, -torch.inf, 0.0],
    "subnormal": [1e-45, 0.0, -1e-45, -0.0],
}


@pytest.mark.parametrize("kind", LOGITS)
def test_whatever_the_options_a_row_has_a_token_and_it_is_the_one_alone(kind):
    options = [SamplingParams(**{"temperature": 1.0, "seed": 7, **extreme}) for extreme in EXTREMES]
    logits = torch.tensor([LOGITS[kind]] * len(options))
    tokens, logprobs = sample(logits, options, [new_generator(params, CPU) for params in options])
    assert np.isfinite(logprobs).all()
    for row, params in enumerate(options):
        assert sample(logits[row : row + 1], [params], [new_generator(params, CPU)])[0] == [tokens[row]]
        if params.top_p < 1e-40:
            assert logits[row, tokens[row]] == logits[row].max()


def test_a_row_that_overflows_leaves_the_streams_of_the_others_alone():
    params = SamplingParams(temperature=1.0, seed=3)
    good = logits_of(0, 1, 4)
    for bad in (torch.nan, torch.inf):
        logits = torch.cat([good, torch.full((1, 4), bad), good])
        tokens, logprobs = sample(logits, [params] * 3, [new_generator(params, CPU) for _ in range(3)])
        assert np.isfinite(logprobs).tolist() == [True, False, True]
        assert tokens[0] == tokens[2] == sample(good, [params], [new_generator(params, CPU)])[0][0]


@given(st.integers(0, 99))
@quick
def test_top_k_of_one_is_greedy(seed):
    logits = logits_of(seed, 11)
    assert draws(logits, SamplingParams(temperature=5.0, top_k=1, seed=seed), 3) == [int(logits.argmax())] * 3


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be a finite number of at least 0, not nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number of at least 0, not inf"),
        ({"top_p": 0.0}, "top_p must be a finite number above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p must be a finite number above 0 and at most 1, not 1.1"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, not -1"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, not 0"),
        ({"stop": ("a", "")}, "stop must be texts that are not empty"),
        ({"stop": ""}, "stop must be texts that are not empty"),
    ],
)
def test_params_refuse(options, message):
    with pytest.raises(OptionError) as caught:
        SamplingParams(**options)
    assert message in str(caught.value)


def test_params_report_all_problems_at_once():
    with pytest.raises(OptionError) as caught:
        SamplingParams(temperature=-1.0, top_p=2.0, top_k=-1, max_tokens=0, stop=("",))
    assert str(caught.value).count("\n  - ") == 5


def test_one_stop_string_is_a_tuple_of_one():
    assert SamplingParams(stop="END").stop == ("END",)


class Waits(TorchDispatchMode):
    """Counts the operations inside it that take a number of a tensor to the host, one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "local_scalar" in func.__name__
        return func(*args, **(kwargs or {}))


def test_no_row_takes_a_number_to_the_host_by_itself():
    params = SamplingParams(temperature=0.7, seed=3)
    with Waits() as waits:
        sample(logits_of(0, 5, 11), [params] * 5, [new_generator(params, CPU) for _ in range(5)])
    assert waits.count == 0
