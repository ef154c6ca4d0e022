"""The package as a whole: which way imports point, what importing costs, what is documented."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import tightfit

ROOT = Path(tightfit.__file__).parent
LAYERS = {"ops": 0, "core": 1, "methods": 2, "presets": 3, "train": 4, "cli": 5}
HEAVY = [
    "bitsandbytes",
    "datasets",
    "liger_kernel",
    "matplotlib",
    "peft",
    "pydantic",
    "tensorboard",
    "torchao",
    "trackio",
    "triton",
    "trl",
    "typer",
    "wandb",
]


def _layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "tightfit" and len(parts) > 1 and parts[1] in LAYERS else None


def _imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # inside its own package
                continue
            yield node.module or ""
            if node.module == "tightfit":
                yield from (f"tightfit.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    files = sorted([*ROOT.glob(f"{layer}/**/*.py"), *ROOT.glob(f"{layer}.py")])
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in _imports(path)
        if (target := _layer(module)) is not None and LAYERS[target] > LAYERS[layer]
    ]
    assert not wrong


def test_the_core_names_no_method():
    names = [cls.__name__ for cls in tightfit.methods()]
    for path in sorted(ROOT.glob("core/**/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not used & set(names), path.name


def _printed(code: str) -> str:
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not out.stderr
    return out.stdout.strip()


def test_importing_is_lean():
    seen = "[name for name in {names!r} if name in sys.modules]"
    light = seen.format(names=["torch", "transformers"])
    assert _printed(f"import sys, tightfit\nprint(tightfit.__version__, {light})") == f"{tightfit.__version__} []"
    heavy = seen.format(names=HEAVY)
    code = f"import sys, tightfit, torch\ntightfit.apply\nprint({heavy}, torch.cuda.is_initialized())"
    assert _printed(code) == "[] False"


@pytest.mark.parametrize("first", ["tightfit", "tightfit.methods", "tightfit.core.apply"])
def test_names_are_there_whichever_module_came_first(first):
    code = (
        f"import {first}\nimport tightfit\n"
        "print(len(tightfit.methods()), tightfit.presets.lora, tightfit.nn.TokenTuringStream.__name__)\n"
        "from tightfit import *\n"
        "print(apply is tightfit.apply, len(methods()), set(tightfit.__all__) <= set(dir(tightfit)))"
    )
    count = len(tightfit.methods())
    assert _printed(code).splitlines() == [f"{count} Lora TokenTuringStream", f"True {count} True"]


@pytest.mark.parametrize("module", ["core.recipe", "train.recipe_file", "presets"])
def test_recipes_are_read_whichever_module_came_first(module):
    code = f"import tightfit.{module}\nfrom tightfit.core.recipe import Recipe\nprint(Recipe.from_list(['Lora']))"
    assert _printed(code) == "Lora"


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="'tightfit' has no attribute 'aply'"):
        getattr(tightfit, "aply")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name 'aply'"):
        from tightfit import aply  # noqa: F401


def test_every_public_name_is_documented():
    assert sorted(tightfit.__all__) == list(tightfit.__all__)
    bare = [
        name
        for name in tightfit.__all__
        if name != "__version__" and not (inspect.getdoc(getattr(tightfit, name)) or "").strip()
    ]
    assert not bare
    classes = [item for item in map(vars(tightfit).get, tightfit.__all__) if inspect.isclass(item)]
    assert not [cls for cls in classes if not vars(cls).get("__doc__")]  # its own, not its base's
    assert not [name for name in vars(tightfit) if not name.startswith("_") and _is_ours(name)]


def _is_ours(name: str) -> bool:
    """A public function or class of the package that the package shows but does not list."""
    item = getattr(tightfit, name)
    ours = (inspect.isfunction(item) or inspect.isclass(item)) and item.__module__.startswith("tightfit")
    return ours and name not in tightfit.__all__


def test_public_verbs_show_an_example_and_what_they_raise():
    for name in ("apply", "plan", "load", "measure", "chain", "skeleton"):
        doc = inspect.getdoc(getattr(tightfit, name)) or ""
        assert ">>>" in doc, name
        assert "Raises:" in doc or name == "plan", name
    for cls in tightfit.methods():
        for part in (">>>", "Raises:", "Fields:", "Source:", "arXiv"):
            assert part in (cls.__doc__ or ""), f"{cls.__name__}: {part}"


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(ROOT)], "tightfit.")
    if _layer(module.name) in ("core", "methods", "ops")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name == "triton":
            pytest.skip("needs triton")
        raise
    assert module.__doc__ or Path(module.__file__).name == "__init__.py", f"{name} has no docstring"
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not result.failed
