"""The suites of `treadle bench`, by name; each returns tables (`treadle.experiments.timing`).

Tokens are counted, not judged: no row ends before its time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from treadle.common.errors import OptionError, problem_list, unknown_name
from treadle.experiments.decode import decode, prefill
from treadle.experiments.memory_use import memory
from treadle.experiments.peers.suite_adapters import STEPS, adapters
from treadle.experiments.peers.suite_peers import peers
from treadle.experiments.router_speed import router
from treadle.experiments.timing import Table
from treadle.experiments.workbench import SPARE, Lab, routings

SUITES: dict[str, Callable[[Lab], Iterable[Table]]] = {
    "decode": decode,
    "prefill": prefill,
    "router": router,
    "adapters": adapters,
    "peers": peers,
    "memory": memory,
}
"""By the name that the command line takes."""


def check_suites(names: Sequence[str]) -> None:
    """Raise an OptionError that lists the names that are no suite."""
    if unknown := [unknown_name("suite", name, SUITES) for name in names if name not in SUITES]:
        raise OptionError(problem_list("suites:", unknown))


def check_lab(lab: Lab, names: Sequence[str]) -> None:
    """Raise an OptionError that lists what these suites cannot measure with this bundle, before anything is timed."""
    params = lab.params
    texts = {
        "decode": [("--prompt + --tokens", params.prompt + params.tokens + SPARE)],
        "prefill": [("--long-prompt", params.long_prompt + 1)],
        "router": [("--prompt + --tokens", params.prompt + params.tokens + SPARE)],
        "adapters": [("--prompt", params.prompt + STEPS + SPARE)],
        "peers": [
            ("--prompt + --tokens", params.prompt + params.tokens),
            ("--paper-text + --rounds", params.paper_text + params.rounds + SPARE),
        ],
        "memory": [("--tokens", params.tokens)],
    }
    longest: dict[str, int] = {}
    for flags, tokens in (each for name in names for each in texts[name]):
        longest[flags] = max(tokens, longest.get(flags, 0))
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
