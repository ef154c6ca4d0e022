"""Every method on two processes, under DDP, the Trainer and FSDP2: as on one process, or refused before it trains.

What is found must be what docs/data/processes.json says, of which the table in the docs is made. Anew:
`TIGHTFIT_WRITE_TABLES=1 pytest -m slow tests/processes`, then `python docs/generate.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import process_cases as pc
import pytest
import torch
from safetensors.torch import load_file

import tightfit

# a random model puts much probability on dropped tokens, and a plain model is not the one that was trained
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:PartialEmbedding\(head='pruned'\):UserWarning"),
    pytest.mark.filterwarnings(r"ignore:(merge|export)\(\). the weights were trained with a second:UserWarning"),
]

TABLE = Path(__file__).parents[2] / "docs" / "data" / "processes.json"
WRITES = bool(os.environ.get("TIGHTFIT_WRITE_TABLES"))
LIBRARIES = ("torch", "transformers", "accelerate", "peft")
ENGINES = {"ddp": "DDP", "trainer": "Trainer (DDP)", "fsdp2": "FSDP2"}
OWN_GRADIENTS = 1e-4
QUICK = (
    "lora/bert",
    "partial-embedding/llama",
    "fused-ops/llama",
    "wta-crs/bert",
    "token-tune/llama",
    "sparse-adapter/bert",
)


def keys_of(engine: str) -> list[str]:
    """The cases of an engine; the Trainer trains by DDP, so each recipe on one model is enough there."""
    if engine != "trainer":
        return list(pc.CASES)
    first: dict[str, str] = {}
    for case in sorted(pc.CASES.values(), key=lambda case: case.family != "llama"):
        if not case.draws:
            first.setdefault(case.name, case.key)
    return list(first.values())


def launch(worker: str, engine: str, keys, folder: Path, timeout: float) -> list[tuple[dict, dict]]:
    """What both processes of a worker found, case by case."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).parent / worker), engine, str(folder), *keys]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = f"none within {timeout} s"
    done = [path.stem for path in folder.glob("*.pt")]
    assert code == 0, f"{engine}: exit {code} after {len(done)} results: {(folder / 'output.txt').read_text()[-4000:]}"
    return [tuple(torch.load(folder / f"{at}-{rank}.pt") for rank in range(pc.WORLD)) for at in range(len(keys))]


def outcome(case: pc.Case, engine: str, both: tuple[dict, dict], folder: Path, alone: dict, alone_folder: Path) -> dict:
    """The verdict on one case. Raises: AssertionError where both processes trained to something else than one."""
    where = f"{case.key} under {ENGINES[engine]}"
    first, second = both
    for found in both:
        assert "error" not in found, f"{where}: {found['trace']}"
    refusals = {found.get("refused") for found in both}
    if refusals != {None}:
        assert None not in refusals, f"{where}: one process went on, the other was refused: {refusals}"
        return {"verdict": "refused", "gap": None, "reason": refusals.pop()}
    apart = [
        n for n, v in first["after"].items() if not n.startswith("part:") and not torch.equal(v, second["after"][n])
    ]
    assert not apart, f"{where}: the processes have drifted apart at {apart[:3]}"
    if case.draws:
        nothing = {name: torch.zeros_like(value) for name, value in first["own"].items()}
        gap, place = pc.gap(first["gradients"], first["own"], nothing)
        assert gap < OWN_GRADIENTS, f"{where}: gradients are not the mean of the processes' own: {gap:.1e} at {place}"
    else:
        gap, place = pc.gap(first["after"], alone["after"], alone["before"])
        assert gap < case.tolerance, f"{where}: off by {gap:.1e} of what training changed, at {place}"
    _check_left(where, case, first["after"], folder, alone_folder)
    return {"verdict": "own draws" if case.draws else "equal", "gap": gap, "reason": None}


def _check_left(where: str, case: pc.Case, after: dict, folder: Path, alone: Path) -> None:
    """The artifact and the stock checkpoint are those of one process."""
    documents = [json.loads((path / "saved" / "recipe.json").read_text()) for path in (folder, alone)]
    for document in documents:
        del document["tensors_sha256"]
    assert documents[0] == documents[1], f"{where}: recipe.json differs"
    saved, wanted = (load_file(path / "saved" / "tightfit.safetensors") for path in (folder, alone))
    assert set(saved) == set(wanted), where
    for name, value in saved.items():
        if name in after and after[name].shape == value.shape:
            assert torch.equal(value, after[name]), f"{where}: {name} was not saved as it was trained"
    assert (folder / "stock").exists() == (alone / "stock").exists(), where
    if not (alone / "stock").exists():
        return
    exported, wanted = (load_file(path / "stock" / "model.safetensors") for path in (folder, alone))
    assert set(exported) == set(wanted), f"{where}: {set(exported) ^ set(wanted)}"
    if not case.draws:
        for name, value in wanted.items():
            torch.testing.assert_close(
                exported[name], value, rtol=1e-3, atol=5e-4, msg=lambda m, n=name: f"{where}, {n}: {m}"
            )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(engine, case) -> (result, folder) of the run on one process; DDP and FSDP2 share theirs."""
    known: dict[tuple[bool, str], tuple[dict, Path]] = {}
    root = tmp_path_factory.mktemp("alone")

    def found(engine: str, case: pc.Case) -> tuple[dict, Path]:
        by_trainer = engine == "trainer"
        if (by_trainer, case.key) not in known:
            folder = root / f"{len(known)}"
            run = pc.one_process_with_trainer if by_trainer else pc.one_process
            known[by_trainer, case.key] = (run(case, folder), folder)
        return known[by_trainer, case.key]

    return found


def outcomes(engine: str, keys, folder: Path, alone, timeout: float) -> dict[str, dict]:
    """The verdicts of one launch; all failures together."""
    results = launch("worker.py", engine, keys, folder, timeout)
    found, failures = {}, []
    for at, (key, both) in enumerate(zip(keys, results)):
        case = pc.CASES[key]
        try:
            found[key] = outcome(case, engine, both, folder / f"{at}", *alone(engine, case))
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n\n".join([f"{len(failures)} of {len(keys)} cases:", *failures])
    return found


def recorded() -> dict[tuple[str, str], dict]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["rows"] if TABLE.exists() else []
    return {(row["engine"], f"{row['row']}/{row['model']}"): row for row in rows}


def test_two_processes_train_as_one(tmp_path, alone):
    found = outcomes("ddp", QUICK, tmp_path, alone, timeout=240)
    assert {key: row["verdict"] for key, row in found.items()} == {
        key: recorded()[ENGINES["ddp"], key]["verdict"] for key in QUICK
    }
    for at, key in enumerate(QUICK):
        base = pc.applied_to(pc.CASES[key])[1].remove()
        again = tightfit.load(base, tmp_path / f"{at}" / "saved")
        assert again.recipe == pc.applied_to(pc.CASES[key])[1].recipe


def test_the_table_knows_every_case():
    wanted = {(title, key) for engine, title in ENGINES.items() for key in keys_of(engine)}
    assert set(recorded()) == wanted, "write docs/data/processes.json anew (see the head of this file)"
    assert all(row["reason"] is None or row["verdict"] == "refused" for row in recorded().values())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_method_on_two_processes(engine, tmp_path, alone):
    keys = keys_of(engine)
    found = outcomes(engine, keys, tmp_path, alone, timeout=900)
    if WRITES:
        _write(engine, found)
    known = recorded()
    for key in keys:
        row = known[ENGINES[engine], key]
        assert (found[key]["verdict"], found[key]["reason"]) == (row["verdict"], row["reason"]), key


def _write(engine: str, found: dict[str, dict]) -> None:
    """Put the rows of one engine into the table's data."""
    rows = [row for (title, _), row in recorded().items() if title != ENGINES[engine]]
    for key, row in found.items():
        case = pc.CASES[key]
        recipe = pc.applied_to(case)[1].recipe
        methods = [type(transform).__name__ for transform in recipe]
        gap = None if row["gap"] is None else f"1e{math.ceil(math.log10(max(row['gap'], 1e-7)))}"
        place = {"engine": ENGINES[engine], "methods": methods, "row": case.name, "model": case.family}
        rows.append({**place, **row, "gap": gap})
    order = list(ENGINES.values())
    cases = list(pc.CASES)
    rows.sort(key=lambda row: (order.index(row["engine"]), cases.index(f"{row['row']}/{row['model']}")))
    versions = {library: importlib.metadata.version(library).split("+")[0] for library in LIBRARIES}
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")
