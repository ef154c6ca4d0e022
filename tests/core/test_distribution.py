"""What is published: source and wheel hold what they should, and the installed wheel works on its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = [
    "peft",
    "trl",
    "datasets",
    "matplotlib",
    "bitsandbytes",
    "torchao",
    "triton",
    "wandb",
    "tensorboard",
    "typer",
]

pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Source archive and wheel of a clean copy of what is tracked."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"
    copy.mkdir()
    tracked = run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0")
    for name in tracked:
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(ROOT / name, copy / name) if _same_disk(folder) else (copy / name).write_bytes(
                (ROOT / name).read_bytes()
            )
    run(sys.executable, "-m", "hatchling", "build", "-d", folder / "dist", cwd=copy)
    (wheel,) = (folder / "dist").glob("*.whl")
    (source,) = (folder / "dist").glob("*.tar.gz")
    return source, wheel


def _same_disk(folder: Path) -> bool:
    return folder.stat().st_dev == ROOT.stat().st_dev


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built[1]).namelist()
    package = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src/tightfit").rglob("*") if p.is_file()}
    tracked = set(run("git", "ls-files", "src/tightfit", cwd=ROOT).stdout.replace("src/", "", 1).split("\n"))
    tracked = {name.removeprefix("src/") for name in tracked if name}
    assert {n for n in names if not re.match(r"tightfit-[^/]+\.dist-info/", n)} == tracked & package
    assert "tightfit/py.typed" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)


def test_the_source_archive_builds_and_is_small(built):
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    for wanted in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "src/tightfit/__init__.py", "PKG-INFO"):
        assert wanted in names
    assert any(name.startswith("tests/") for name in names)
    odd = [n for n in names if n.startswith(("benchmarks/results", "shared", ".github", "docs/images", "runs"))]
    assert not odd
    assert built[0].stat().st_size < 2_000_000


def test_an_installed_wheel_works(built, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, built[1])
    (packages / "around.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its dependencies, not the package
    loose = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    where = run(python, "-c", "import tightfit; print(tightfit.__file__, tightfit.__version__)", env=loose).stdout
    assert where.startswith(str(packages))
    code = f"import sys, tightfit; print([n for n in {OPTIONAL!r} if n in sys.modules])"
    assert run(python, "-c", code, env=loose).stdout.strip() == "[]"
    run(python, "-m", "tightfit", "--version", env=loose)
    methods = run(python, "-m", "tightfit", "methods", env=loose).stdout
    assert "PartialEmbedding" in methods


def test_importing_takes_little_beside_torch():
    """By Python's own count, against torch's own modules in the same process, as machines and their load differ."""
    found = []
    for _ in range(3):
        report = run(sys.executable, "-X", "importtime", "-c", "import torch; import tightfit").stderr
        rows = re.findall(r"import time:\s+(\d+) \|\s+(\d+) \| (\S+)", report)  # those that nobody else imported
        seconds = {name: int(total) / 1e6 for _, total, name in rows}
        found.append((seconds["tightfit"], seconds["torch"]))
    own, torch = min(found)
    print(f"import tightfit: {own:.2f} s beside torch's {torch:.2f} s")
    assert own < max(2.0, 0.75 * torch)
