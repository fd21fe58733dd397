"""Damages every kind of file that treadle reads, and counts the readings that end in another error than a TreadleError.

    python benchmarks/fuzz.py [--mutations 2000] [--seed 0] [--formats bundle arms ...]

A mutation changes a value's type, deletes or repeats a key, puts an extreme number, a deep nest or an odd text in its
place, flips bytes, or cuts the file. Each format prints how many were refused and read, and the longest time.
"""

import argparse
import copy
import gzip
import json
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from model2vec import StaticModel
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

from treadle.bundle.bundle import read_bundle, save_bundle
from treadle.bundle.centroid_files import read_centroids
from treadle.common.errors import TreadleError
from treadle.common.params import RoutingParams
from treadle.engine.sample_files import load_texts
from treadle.experiments.arms import choose_arms, read_sweep
from treadle.experiments.data import load_examples
from treadle.experiments.results import EvalResult, fractions_of, read_cell, read_results, write_cell, write_results
from treadle.experiments.tasks import read_task
from treadle.routing.embedder import StaticEmbedder, load_embedder
from treadle.routing.fitting import fit
from treadle.serving.openai.keys import read_keys
from treadle.serving.openai.params import read_settings

SECONDS = 10.0
"""After which a mutation counts as a hang."""
WORDS = "[UNK] add sum three four plus cell atom planet heat def return list loop the a of to and in is for".split()
"""Half of the texts of general text hold one of these: the centroids file has all of its arrays."""
SAMPLES = {"math": ["add three plus four", "the sum plus three"], "code": ["def loop return list", "list return loop"]}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, -1e308, 1e-320, 0.5, float("nan"),
    float("inf"), "", "\0", "\ud800", "../..", "/etc/passwd", "a" * 5000, "(" * 200, "(.*)*!", "{x[0]",
    "{a:>9999999}", "\u202e\U0001f600", [], {}, [[]], [None], {"": None}, ["\0"], [1, "a"], {"a": {"b": [1]}},
]  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A file to damage: where it lies below the root, and what reads it."""

    file: str
    read: Callable[[Path], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2000, help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import_module("sentence_transformers")  # takes many seconds, once
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        make_all(Path(folder))
        for name in options.formats:
            faults += fuzz(Path(folder), name, options.mutations, options.seed, print_fault)
    print(f"{faults} faults")
    sys.exit(1 if faults else 0)


def fuzz(root: Path, name: str, mutations: int, seed: int, report: Callable[[str, str], None]) -> int:
    """Damage one format `mutations` times, print a line of what happened, and return the number of faults."""
    given, chooser = FORMATS[name], random.Random(f"{seed} {name}")
    file = root / given.file
    whole = file.read_bytes()
    seen: Counter[str] = Counter()
    longest = 0.0
    given.read(root)  # whole it is right, and what it needs is loaded
    for index in range(mutations):
        file.write_bytes(mutated(whole, file.name, chooser))
        started = time.perf_counter()
        try:
            given.read(root)
            seen["read"] += 1
        except TreadleError as error:
            str(error)
            seen["refused"] += 1
        except BaseException as error:  # tokenizers' panics are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            seen["fault"] += 1
            report(f"{name} {index}: {type(error).__name__}: {str(error)[:100]}", traceback.format_exc())
        seconds = time.perf_counter() - started
        longest = max(longest, seconds)
        if seconds > SECONDS:
            seen["hang"] += 1
            report(f"{name} {index}: {seconds:.1f} s", "")
    file.write_bytes(whole)
    print(f"{name:18} {mutations} mutations: {seen['refused']} refused, {seen['read']} read, "
          f"{seen['fault']} faults, {seen['hang']} hangs, longest {longest:.2f} s", flush=True)  # fmt: skip
    return seen["fault"] + seen["hang"]


def print_fault(title: str, trace: str) -> None:
    print(title, *trace.splitlines()[-7:], sep="\n    ", flush=True)


# Mutations


def mutated(whole: bytes, name: str, chooser: random.Random) -> bytes:
    """Return the bytes of a file with some damage that fits its format."""
    if name.endswith(".gz"):
        inner = gzip.decompress(whole)
        damaged = mutated(inner, name.removesuffix(".gz"), chooser)
        return flipped(whole, chooser) if chooser.random() < 0.3 else gzip.compress(damaged, 1, mtime=0)
    if chooser.random() < 0.25:
        return flipped(whole, chooser)
    if name.endswith(".jsonl"):
        lines = whole.decode().splitlines()
        place = chooser.randrange(len(lines))
        lines[place] = json_text(json.loads(lines[place]), chooser)
        return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
    if name.endswith(".json"):
        return json_text(json.loads(whole), chooser).encode("utf-8", "surrogatepass")
    if name.endswith(".safetensors"):
        return damaged_tensors(whole, chooser)
    return damaged_lines(whole.decode(), chooser).encode("utf-8", "surrogatepass")


def flipped(whole: bytes, chooser: random.Random) -> bytes:
    """Flip, insert, cut or repeat bytes."""
    raw = bytearray(whole)
    for _ in range(chooser.randint(1, 4)):
        place = chooser.randrange(len(raw) + 1)
        kind = chooser.randrange(5)
        if kind == 0 and place < len(raw):
            raw[place] ^= 1 << chooser.randrange(8)
        elif kind == 1:
            raw[place:place] = chooser.randbytes(chooser.randint(1, 8))
        elif kind == 2:
            del raw[place:]
        elif kind == 3:
            del raw[place : place + chooser.randint(1, 64)]
        else:
            raw[place:place] = raw[place : place + chooser.randint(1, 64)]
    return bytes(raw)


def json_text(document: Any, chooser: random.Random) -> str:
    """Return a JSON document with some of its values, keys or depth changed."""
    kind = chooser.random()
    if kind < 0.03:
        return chooser.choice("[{") * chooser.choice([50, 70, 2000, 100_000])
    document = copy.deepcopy(document)
    for _ in range(chooser.randint(1, 3)):
        document = changed(document, chooser)
    text = json.dumps(document)
    if kind < 0.06 and isinstance(document, dict) and document:
        key = json.dumps(chooser.choice(list(document)))
        return text[:-1] + f", {key}: 1}}"
    return text


def changed(document: Any, chooser: random.Random) -> Any:
    """Return a document with one value, anywhere in it, replaced, renamed, deleted or nested."""
    if isinstance(document, dict | list) and document and chooser.random() < 0.85:
        key = chooser.choice(list(document) if isinstance(document, dict) else range(len(document)))
        kind = chooser.random()
        if kind < 0.1:
            del document[key]
        elif kind < 0.15 and isinstance(document, dict):
            document[str(chooser.choice(ODD))] = document.pop(key)
        else:
            document[key] = changed(document[key], chooser)
        return document
    if chooser.random() < 0.05:
        for _ in range(chooser.choice([40, 70, 200])):
            document = [document]
        return document
    return copy.deepcopy(chooser.choice(ODD))


def damaged_tensors(whole: bytes, chooser: random.Random) -> bytes:
    """Change the header of a safetensors file or the numbers behind it."""
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), bytearray(whole[8 + length :])
    kind = chooser.random()
    if kind < 0.4:
        numbers = np.frombuffer(data[: len(data) // 4 * 4], np.float32).copy()
        count = chooser.choice([1, len(numbers)])
        start = chooser.randrange(len(numbers) - count + 1)
        odd = [np.nan, np.inf, 3e38, -3e38, 1e-45, 0.0, 1e20]
        numbers[start : start + count] = chooser.choice(odd)
        data[: numbers.nbytes] = numbers.tobytes()
    elif kind < 0.7:
        name = chooser.choice([key for key in header if key != "__metadata__"])
        header[name]["dtype"] = chooser.choice(
            ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x"]
        )
        if chooser.random() < 0.7:
            size = {"F64": 8, "I64": 8, "C64": 8, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
            begin, end = header[name]["data_offsets"]
            header[name]["shape"] = [(end - begin) // size.get(header[name]["dtype"], 4)]
    else:
        header = changed(header, chooser)
    text = json.dumps(header).encode()
    stated = len(text) if chooser.random() < 0.9 else chooser.choice([0, 1, 2**20, 2**63, 2**64 - 1])
    return stated.to_bytes(8, "little") + text + bytes(data)


def damaged_lines(text: str, chooser: random.Random) -> str:
    """Change the lines of a text file, the values behind = and : above all."""
    lines = text.splitlines()
    for _ in range(chooser.randint(1, 3)):
        place = chooser.randrange(len(lines))
        head, mark, _ = lines[place].partition("=" if "=" in lines[place] else ":")
        odd = chooser.choice(ODD)
        values = [
            json.dumps(odd),
            str(odd),
            "[" * 500,
            "*x",
            "!!python/object:os.system {}",
            "2001-99-99",
            "{a: &x 1}",
            "0o9",
        ]
        kind = chooser.randrange(4)
        if kind == 0:
            lines[place] = f"{head}{mark} {chooser.choice(values)}" if mark else chooser.choice(values)
        elif kind == 1:
            lines.insert(place, lines[chooser.randrange(len(lines))])
        elif kind == 2:
            lines[place] = lines[place][: chooser.randrange(len(lines[place]) + 1)]
        else:
            lines.insert(place, chooser.choice(values))
    return "\n".join([*lines, ""])


# Files that are whole


def make_all(root: Path) -> None:
    """Write one whole file of each format below `root`."""
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), 8)).astype(np.float32)
    core = Tokenizer(WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = BertPreTokenizer()
    embedder = StaticEmbedder(StaticModel(vectors, core, max_length=None))
    folders = {name: make_adapter(root / name) for name in SAMPLES}
    save_bundle(root / "bundle", base="tiny", adapters=folders, router=fit(SAMPLES, embedder), samples=SAMPLES)
    make_old_centroids(root / "old.safetensors")
    rows = [{"prompt": f"add {index}", "completion": "three", "n": index, "more": {"x": ["y"]}} for index in range(4)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rows.jsonl.gz").write_bytes(gzip.compress((root / "rows.jsonl").read_bytes(), mtime=0))
    (root / "texts.txt").write_text("add three\nthe sum of four\nplus: loop = list\n")
    task = {"name": "mine", "prompt": "Q: {prompt}", "completion": " {completion}", "bare": "{more[x][0]}",
            "stop": ["\n"], "metrics": ["exact_match"], "max_tokens": 8, "source": "rows.jsonl",
            "answers": "completion"}  # fmt: skip
    (root / "task.json").write_text(json.dumps(task))
    (root / "arms.toml").write_text(
        '[arms.mine]\nevery = 4\nwindow = 64\n\n[grid.many]\nevery = [1, 2, "none"]\nboost = 2.0\n'
    )
    sweep = 'tasks = ["math=rows.jsonl"]\nalso = ["base"]\nlimit = 4\nseed = 1\n\n[grid.many]\nevery = [1, 2]\n'
    (root / "sweep.toml").write_text(sweep)
    (root / "server.yaml").write_text("port: 8000\nmax_tokens: 64\napi_key: [a, b]\nhost: 127.0.0.1\nmax_queue: 8\n")
    (root / "keys.txt").write_text("key-one\nkey-two math,code\n# a comment\nkey-three code\n")
    make_results(root / "results")


def make_old_centroids(file: Path) -> None:
    """Write centroids as treadle 0.1 did: adapters of two groups of two samples."""
    x = np.random.default_rng(0).normal(size=(2, 2, 2, 8))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    means = x.mean((1, 2))  # (N, D)
    apart = x - means[:, None, None]
    arrays = {"means": means, "scatter": np.einsum("ngsd,ngse->nde", apart, apart), "counts": np.full(2, 4),
              "group_means": x.mean(2).reshape(4, 8), "group_owners": np.repeat([0, 1], 2),
              "group_sizes": np.full(4, 2)}  # fmt: skip
    typed = {key: each.astype(np.float32) if each.dtype == np.float64 else each for key, each in arrays.items()}
    save_file(typed, file, {"names": '["math", "code"]', "embedder_id": "test"})


def make_adapter(folder: Path) -> Path:
    """Write a PEFT folder of two modules, one of another rank and alpha."""
    folder.mkdir()
    random_numbers = np.random.default_rng(len(folder.name))
    ranks = {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.self_attn.v_proj": 3}
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": random_numbers.normal(size=shape).astype(np.float32)
        for path, rank in ranks.items()
        for side, shape in (("A", (rank, 8)), ("B", (8, rank)))
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 2, "lora_alpha": 4, "bias": "none",
              "target_modules": ["q_proj", "v_proj"], "exclude_modules": None, "rank_pattern": {"v_proj": 3},
              "alpha_pattern": {"layers.0.self_attn.v_proj": 6}, "use_rslora": False, "layers_to_transform": [0],
              "lora_dropout": 0.1, "modules_to_save": None}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_results(output: Path) -> None:
    """Write the results of one cell."""
    output.mkdir()
    routing = asdict(RoutingParams())
    result = EvalResult(
        "routed", "math", "nll", 1.0, 0.5, 1.5, 2, routing, "rows", 1.0, 8, 8.0, 0, {"treadle": "0"}, "x"
    )
    write_results(output, [result], append=False)
    cell = [
        {"index": index, "values": {"nll": [1.5, 2]}, "text": "three", "weights": [[0.5, 0.5]]} for index in range(2)
    ]
    write_cell(output, "routed", "math", cell)
    (output / "settings.json").write_text(json.dumps({"params": {"limit": 2}, "versions": {"treadle": "0"}}))


def embed(root: Path) -> None:
    load_embedder(root / "bundle/embedder").encode(["add three", "loop \u00e9 9", ""])


def route(root: Path) -> None:
    read_bundle(root / "bundle").router.weights(["add three", ""])


def weigh_old(root: Path) -> None:
    centroids = read_centroids(root / "old.safetensors")
    views = np.full((2, 1 + len(centroids.tails), centroids.means.shape[1]), 0.1, np.float32)
    centroids.evidence(views, np.array([False, True]))


def read_arms(root: Path) -> None:
    choose_arms([str(root / "arms.toml")], ["math", "code"], RoutingParams())


def read_all_results(root: Path) -> None:
    for result in read_results(root / "results"):
        fractions_of(root / "results", result.arm, result.task, result.metric)


def examples(file: str) -> Callable[[Path], None]:
    return lambda root: (load_examples(root / file), load_texts(root / file)) and None


def by_task(root: Path) -> None:
    load_examples(root / "rows.jsonl", read_task(root / "task.json"))


FORMATS: Mapping[str, Format] = {
    "bundle": Format("bundle/bundle.json", route),
    "centroids": Format("bundle/centroids.safetensors", route),
    "old centroids": Format("old.safetensors", weigh_old),
    "samples": Format("bundle/samples.json", route),
    "adapter config": Format("bundle/adapters/math/adapter_config.json", route),
    "adapter factors": Format("bundle/adapters/math/adapter_model.safetensors", route),
    "embedder config": Format("bundle/embedder/config.json", embed),
    "embedder modules": Format("bundle/embedder/modules.json", embed),
    "embedder tokenizer": Format("bundle/embedder/tokenizer.json", embed),
    "embedder vectors": Format("bundle/embedder/model.safetensors", embed),
    "rows": Format("rows.jsonl", examples("rows.jsonl")),
    "packed rows": Format("rows.jsonl.gz", examples("rows.jsonl.gz")),
    "texts": Format("texts.txt", lambda root: load_texts(root / "texts.txt")),
    "task": Format("task.json", by_task),
    "rows of a task": Format("rows.jsonl", by_task),
    "arms": Format("arms.toml", read_arms),
    "sweep": Format("sweep.toml", lambda root: read_sweep(root / "sweep.toml", ("math", "code"), RoutingParams())),
    "results": Format("results/results.jsonl", read_all_results),
    "cell": Format("results/cells/math/routed.jsonl", lambda root: read_cell(root / "results", "routed", "math")),
    "server config": Format("server.yaml", lambda root: read_settings({}, {}, root / "server.yaml")),
    "keys": Format("keys.txt", lambda root: read_keys(root / "keys.txt")),
}  # fmt: skip


if __name__ == "__main__":
    main()
