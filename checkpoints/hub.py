"""From what a user calls a model to a folder on this machine."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import CheckpointError

# Weights in one format, and what stands beside them; never the second copies that some repositories carry.
FETCHED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "LICENSE*", "NOTICE*"]
NOT_FETCHED = ["original/*", "consolidated*", "onnx/*"]
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(
    name_or_path: str | Path | None,
    *,
    revision: str | None = None,
    download: Callable[..., str] = huggingface_hub.snapshot_download,
) -> Path:
    """The folder of a model: a folder's own path, the bundled model for None or "", otherwise a Hub repository's files.

    Hub files come through `huggingface_hub`, which honours HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Raises CheckpointError
    when there is neither such a folder nor such a repository, or when it cannot be fetched.
    """
    if not name_or_path:
        folder = bundled_model()
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"the bundled model is missing from this installation: no {folder / 'config.json'}")
        return folder
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"model {name!r} is a file; a folder or a Hub id is needed")
    if isinstance(name_or_path, Path) or not _REPOSITORY.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"model {name!r}: there is no such folder")
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(download(name, revision=revision, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED))
    except GatedRepoError as error:
        raise CheckpointError(
            f"model {name!r} is gated: ask for access on its Hub page and set HF_TOKEN to a token of yours"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"model {name!r} has no revision {revision!r} on the Hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"model {name!r} is neither a folder here nor a Hub repository that this account can see (HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise CheckpointError(
            f"model {name!r}{at} is neither a folder here nor in the Hub cache (HF_HOME), and {why}"
        ) from error
    # A full disk, an incomplete cache, or the HTTP client's own errors, which change with the Hub client's version.
    except Exception as error:
        raise CheckpointError(f"model {name!r}{at} cannot be fetched from the Hub: {error}") from error


def bundled_model() -> Path:
    """The folder of the small model that comes with the package."""
    return Path(str(importlib.resources.files("paddock.checkpoints") / "bundled"))
