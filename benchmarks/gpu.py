"""Decoding on a GPU, random-weight models of known shapes: routing off against weights that change every token.

    python benchmarks/gpu.py --check                        # the laws, on small models
    python benchmarks/gpu.py --output gpu.jsonl             # the whole table, some minutes on an H100
    python benchmarks/gpu.py --only Llama-3-8B --no-peers   # a part of it
    python benchmarks/gpu.py --show gpu.jsonl               # as markdown; several files are joined

For each shape, set of four adapters, batch and context: milliseconds of a step with routing off and blended, in turn
(blocks of steps between two CUDA events; median and quartiles), their ratio, and the share of the bandwidth of a large
copy that reading weights, factors and cache once in this time takes. Then whole engine steps by the clock, router and
sampling included, and the same calls by PEFT: one adapter, Arrow, X-LoRA. Before anything is timed, logits are compared
with those of the model's own forward. Each result is printed, and written to --output as a line of JSON, as it comes.
"""

import argparse
from pathlib import Path

import torch
from gpu_check import check
from gpu_clock import DEVICE, Report, copied, free
from gpu_lab import ADAPTERS, NUM_ADAPTERS, SHAPES, build_engine, build_model, draw_adapters
from gpu_peers import report_peers
from gpu_products import report_products
from gpu_show import show
from gpu_steps import Lab

from treadle.experiments.machine import Machine

BATCHES, CONTEXTS = (1, 8, 32, 128), (512, 4096)
SMALL_BATCHES, SMALL_CONTEXTS = (1, 3), (40,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run the laws and nothing else")
    parser.add_argument("--show", type=Path, nargs="+", help="print tables of earlier --output and nothing else")
    parser.add_argument("--no-products", action="store_true", help="do not time the forms of the products")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--only", nargs="+", default=["Llama-2-7B", "Llama-3-8B"], choices=SHAPES, help="`small` = a try"
    )
    parser.add_argument("--rounds", type=int, default=12, help="blocks of steps of each arm")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which nothing more is begun")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.show:
        print(show(options.show))
    elif options.check:
        exact_attention()
        raise SystemExit(check())
    else:
        measure(options, Report(options.output))


def exact_attention() -> None:
    """Let the reference compute attention in full float32."""
    torch.backends.cuda.enable_flash_sdp(enabled=False)
    torch.backends.cuda.enable_mem_efficient_sdp(enabled=False)
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)


def measure(options: argparse.Namespace, report: Report) -> None:
    peak = copied()
    for shape in options.only:
        model = build_model(SHAPES[shape], DEVICE)
        report("machine", about=str(Machine.of(model)), copied_gb_s=peak / 1e9, shape=shape)
        for kind, (rank, targets) in ADAPTERS.items():
            if report.seconds > options.limit:
                continue
            engine = build_engine(model, draw_adapters(model, NUM_ADAPTERS, rank, targets))
            lab = Lab(engine, f"{shape}, {kind}", peak, options.rounds, report)
            batches, contexts = (SMALL_BATCHES, SMALL_CONTEXTS) if shape == "small" else (BATCHES, CONTEXTS)
            if not options.no_products and DEVICE == "cuda":
                report_products(lab.step, lab.name, batches, peak, report)
            lab.run(batches, contexts, options.limit)
            engine.detach()
            del engine, lab
            free()
        del model
        free()
    if not options.no_peers and report.seconds < options.limit:
        report_peers(options.only[0], next(iter(ADAPTERS)), max(2, options.rounds // 2), report)


if __name__ == "__main__":
    main()
