"""The suites of `treadle bench`, by name; each returns tables (`treadle.experiments.timing`).

Tokens are counted, not judged: no row ends before its time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from treadle.bundle.bundle_files import has_bundle
from treadle.common.errors import OptionError, problem_list, unknown_name
from treadle.experiments.decode import decode, prefill
from treadle.experiments.memory_use import memory
from treadle.experiments.router_speed import router
from treadle.experiments.timing import Table
from treadle.experiments.workbench import SPARE_TOKENS, Lab, routings

PEER_SUITES = ("adapters", "peers")
"""Suites that 0.1 had and that benchmarks/peers has now."""
SUITES: dict[str, Callable[[Lab], Iterable[Table]]] = {
    "decode": decode,
    "prefill": prefill,
    "router": router,
    "memory": memory,
}
"""Suites by their name on the command line."""


def check_suites(names: Sequence[str]) -> None:
    """Raise an OptionError that lists the names that are no suite."""
    if moved := [name for name in names if name in PEER_SUITES]:
        raise OptionError(
            f"suites {', '.join(moved)}: in treadle's repository, run `python -m benchmarks.peers BUNDLE --suite "
            f"{' '.join(moved)}`"
        )
    if unknown := [unknown_name("suite", name, SUITES) for name in names if name not in SUITES]:
        raise OptionError(problem_list("suites:", unknown))


def check_lab(lab: Lab, names: Sequence[str]) -> None:
    """Raise an OptionError that lists what these suites cannot measure with this bundle, before anything is timed."""
    params = lab.params
    texts = {
        "decode": [("--prompt + --tokens", params.prompt + params.tokens + SPARE_TOKENS)],
        "prefill": [("--long-prompt", params.long_prompt + 1)],
        "router": [("--prompt + --tokens", params.prompt + params.tokens + SPARE_TOKENS)],
        "memory": [("--tokens", params.tokens)],
    }
    longest: dict[str, int] = {}
    for flags, tokens in (each for name in names for each in texts[name]):
        longest[flags] = max(tokens, longest.get(flags, 0))
    if "memory" in names and not has_bundle(lab.bundle.folder):
        raise OptionError("the suite memory starts processes that load a bundle: make one by treadle fit, and name it.")
    check_texts(lab, longest)


def check_texts(lab: Lab, longest: Mapping[str, int]) -> None:
    """Raise an OptionError where texts are longer than the context, or the bundle's routing cannot be measured.

    Args:
        lab: what measures.
        longest: tokens of the longest text, by the flags that set them.
    """
    problems = [problem for flags, tokens in longest.items() if (problem := lab.context_problem(tokens, flags))]
    try:
        lab.engine.check_routing(list(routings(lab.routing).values()))
    except OptionError as error:
        problems += [each.text for each in error.problems]
    if problems:
        raise OptionError(problem_list("this bundle cannot be measured so:", problems))


def measure(lab: Lab, names: Sequence[str]) -> Iterator[Table]:
    """Yield the tables of the suites `names` (`check_suites`) as they are measured."""
    return (table for name in names for table in SUITES[name](lab))
