"""Model cards of exported checkpoints, and their way to the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tightfit._version import __version__
from tightfit.core import processes
from tightfit.core.errors import ArtifactError
from tightfit.core.recipe import Recipe

CARD = "README.md"


def card_text(model: Any, recipe: Recipe) -> str:
    """A model card: what the checkpoint is, how it was trained, how it is loaded."""
    base = base_name(model)
    front = {"library_name": "transformers", "tags": ["tightfit"], **({"base_model": base} if base else {})}
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    methods = "\n".join(f"- `{transform!r}`" for transform in recipe) or "- none: full fine-tuning"
    name = processes.class_name(model)
    of = f"`{base}`, " if base else ""
    return f"""\
---
{head}
---

# {name}

{of}fine-tuned with [tightfit](https://pypi.org/project/tightfit/) {__version__} and merged into a stock checkpoint:

{methods}

```python
from transformers import {name}

model = {name}.from_pretrained("path-or-hub-id")  # of this checkpoint
```
"""


def base_name(model: Any) -> str | None:
    """The hub id that a model was loaded from; a folder's name says nothing elsewhere, so there is none then."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return name if name and not is_folder(name) else None


def is_folder(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).exists()


def check_repository(repository: Any) -> None:
    """Raises: ArtifactError for what cannot be a repository of the Hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        if not isinstance(repository, str):
            raise HFValidationError(f"it is a {type(repository).__name__}")
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ArtifactError(
            f"push_to_hub: {repository!r} is no repository id ({error}); accepted is 'name' or 'user/name'"
        ) from None


def push(folder: Path, repository: str, *, private: bool | None = None) -> str:
    """Upload an exported folder to a model repository, which is made where there is none; returns its address.

    The token is the one that `hf auth login` stored, or HF_TOKEN.

    Raises:
        ArtifactError: no token, no connection, no permission; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi(library_name="tightfit", library_version=__version__)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=f"Export by tightfit {__version__}")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"push_to_hub: {repository} could not be written ({type(error).__name__}: {reason}); the checkpoint is in "
            f"{folder}; log in by `hf auth login` and push it by `hf upload {repository} {folder}`"
        ) from error
    return str(url)
