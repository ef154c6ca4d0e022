"""Write the tables of README and docs: the text between `<!-- results:NAME -->` and `<!-- end -->`.

NAME is a result file of benchmarks/results or docs/data and the module of docs/tables that renders it, by its function
`table`; NAME.PART asks its function PART. `python docs/generate.py` rewrites the files; `--check` says which are out of
date and exits with 1.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = (ROOT / "benchmarks" / "results", ROOT / "docs" / "data")
MARK = re.compile(r"(<!-- results:(\w+)(?:\.(\w+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def section(match: re.Match[str]) -> str:
    """One marked section made anew; without a result file it stays as it is."""
    begin, name, part, _, end = match.groups()
    render = getattr(importlib.import_module(f"tables.{name}"), part or "table")
    for folder in RESULTS:
        if (path := folder / f"{name}.json").exists():
            return f"{begin}{render(json.loads(path.read_text(encoding='utf-8')))}\n{end}"
    return match[0]


def main(check: bool) -> int:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = MARK.sub(section, old)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
