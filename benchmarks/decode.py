"""Prints decoding with four blended adapters against transformers' own `generate` of the bare base, in both dtypes.

    python benchmarks/decode.py [--tokens 32] [--rounds 7]

The first table of `treadle bench --suite decode`, once a dtype: interleaved runs in one process (A B C A B C ...) after
a warm-up, medians and quartiles of a whole call, prompt included, over its tokens. All arms make as many, greedily.
"""

import argparse
from pathlib import Path

import treadle
from treadle.bundle.base_model import quiet_libraries
from treadle.common.params import BenchParams
from treadle.experiments.decode import calls
from treadle.experiments.timing import markdown
from treadle.experiments.workbench import Lab

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    quiet_libraries()
    params = BenchParams(batch=tuple(options.batch), tokens=options.tokens, rounds=options.rounds)
    for dtype in options.dtype:
        lab = Lab.open(treadle.read_bundle(options.bundle), None, dtype, params)
        print(f"{lab.about}\n\n{markdown(calls(lab))}\n", flush=True)


if __name__ == "__main__":
    main()
