"""Prints treadle beside transformers, PEFT, the paper's loop and vLLM, and engines with many adapters.

    python -m benchmarks.peers demo/bundle --suite peers adapters --batch 1 8 -o DIR

The tables have the form of `treadle bench`, and `treadle plot DIR` draws the ratios that `-o DIR` keeps.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from treadle.bundle.base_model import quiet_libraries
from treadle.bundle.bundle import read_bundle
from treadle.common.errors import TreadleError
from treadle.common.files import make_folder
from treadle.experiments.params import BenchParams
from treadle.experiments.results import write_bench
from treadle.experiments.suites import check_texts
from treadle.experiments.timing import Table, markdown
from treadle.experiments.workbench import SPARE_TOKENS, Lab

from .peers import PeerOptions
from .suite_adapters import POOL_STEPS, adapters
from .suite_peers import peers

SUITES: dict[str, Callable[[Lab, PeerOptions], Iterable[Table]]] = {
    "peers": peers,
    "adapters": lambda lab, _: adapters(lab),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_arguments(arguments)
    quiet_libraries()
    params = BenchParams(
        batch=tuple(options.batch), prompt=options.prompt, tokens=options.tokens, rounds=options.rounds
    )
    own = PeerOptions(options.paper_text, options.sentence, options.vllm, options.vllm_compile)
    lab = Lab.open(read_bundle(options.bundle), options.device, options.dtype, params, pack=options.pack)
    check(lab, own, options.suite)
    if options.output:
        make_folder(options.output)
    print(lab.about)
    found: list[Table] = []
    for table in (table for name in options.suite for table in SUITES[name](lab, own)):
        found.append(table)
        print(f"\n{markdown(table)}", flush=True)
        if options.output:  # after each table: a later one may fail
            write_bench(options.output, options.suite, lab.facts, found)


def check(lab: Lab, own: PeerOptions, suites: Iterable[str]) -> None:
    """Refuse texts that are longer than the model's context."""
    params = lab.params
    texts = {
        "peers": {
            "--prompt + --tokens": params.prompt + params.tokens,
            "--paper-text + --rounds": own.paper_text + params.rounds + SPARE_TOKENS,
        },
        "adapters": {"--prompt": params.prompt + POOL_STEPS + SPARE_TOKENS},
    }
    check_texts(lab, {flags: tokens for name in suites for flags, tokens in texts[name].items()})


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=["peers"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens made for each sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--paper-text", type=int, default=256, help="tokens of the text of peers without a cache")
    parser.add_argument("--sentence", default=PeerOptions.sentence, help="embedder of the paper's loop")
    parser.add_argument("--vllm", default=PeerOptions.vllm, help="Python of an environment that has vLLM")
    parser.add_argument(
        "--vllm-compile", action="store_true", help="vLLM's compiled mode, which takes minutes to start"
    )
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--pack", action=argparse.BooleanOptionalAction)
    parser.add_argument("-o", "--output", type=Path, help="folder for `treadle plot`")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except TreadleError as error:
        sys.exit(str(error))
