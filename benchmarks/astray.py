"""Prints which passages of SQuAD's test rows the demo's router gives to other adapters than `reading`, by article.

    python benchmarks/astray.py --data ../shared/data

The base model is not run.
"""

import argparse
from collections import Counter
from pathlib import Path

import treadle
from treadle.experiments.data import read_rows
from treadle.experiments.tasks import TASKS

BUNDLE = Path(__file__).parents[1] / "demo" / "bundle"
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    router = treadle.read_bundle(BUNDLE).router
    rows = list(read_rows(options.data / "squad-validation-even.jsonl.gz"))
    texts = [TASKS["reading"].read(row).prompt for row in rows]
    nearest = router.scores(texts, router.params).argmax(-1)
    names = [router.names[index] for index in nearest]
    astray = Counter((row["title"], name) for row, name in zip(rows, names, strict=True) if name != "reading")
    prompts = Counter(row["title"] for row in rows)
    total = astray.total()
    print(f"{total} of {len(rows)} prompts of {len(prompts)} articles ({100 * total / len(rows):.1f} %); the first:\n")
    print("| article | goes to | prompts | of the article's | of all astray |\n|---|---|---|---|---|")
    for (title, name), count in astray.most_common(SHOWN):
        cells = f"{count} | {100 * count / prompts[title]:.0f} % | {100 * count / total:.0f} %"
        print(f"| {title.replace('_', ' ')} | {name} | {cells} |")
    cut = sum(router.topic_start(text, router.params) > 0 for text in texts)
    print(f"\n{cut} prompts ({100 * cut / len(texts):.1f} %) are cut where their domain is said to change (`change`)")


if __name__ == "__main__":
    main()
