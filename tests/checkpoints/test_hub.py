"""From what a user calls a model to a folder."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import types
from typing import Any

import pytest
from huggingface_hub import errors

from paddock.checkpoints import bundled_model, resolve_model


def never(*_, **__):
    pytest.fail("the Hub was asked")


def test_a_folder_is_itself(tmp_path):
    (tmp_path / "org").mkdir()
    assert resolve_model(tmp_path, download=never) == tmp_path
    assert resolve_model(str(tmp_path / "org"), download=never) == tmp_path / "org"


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model", download=never) == tmp_path / "model"


@pytest.mark.parametrize("nothing", [None, ""])
def test_the_default_is_the_bundled_model(nothing, tmp_path, monkeypatch):
    monkeypatch.setattr("paddock.checkpoints.hub.bundled_model", lambda: tmp_path)
    with pytest.raises(ValueError, match="the bundled model is missing"):
        resolve_model(nothing, download=never)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(nothing, download=never) == tmp_path


def test_the_bundled_model_lies_in_the_package():
    import paddock.checkpoints

    assert bundled_model().parent.samefile(os.path.dirname(paddock.checkpoints.__file__))


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "../model", "a/b/c", "~/gone", "my model"])
def test_what_cannot_be_a_repository_is_not_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"model '{name}': there is no such folder"):
        resolve_model(name, download=never)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.gguf' is a file"):
        resolve_model(str(tmp_path / "model.gguf"), download=never)


def test_a_hub_id_is_fetched_without_second_copies(tmp_path):
    repository = {
        "config.json": True,
        "generation_config.json": True,
        "model-00001-of-00002.safetensors": True,
        "tokenizer.model": True,
        "chat_template.jinja": True,
        "original/params.json": False,
        "original/tokenizer.model": False,
        "consolidated.safetensors": False,
        "pytorch_model.bin": False,
        "onnx/config.json": False,
    }
    asked = []

    def download(repo_id, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo_id, revision))
        for name, wanted in repository.items():
            is_allowed, is_ignored = (
                any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
                for patterns in (allow_patterns, ignore_patterns)
            )
            assert (is_allowed and not is_ignored) == wanted, name
        return str(tmp_path)

    assert resolve_model("meta-llama/Llama-3.2-1B", revision="main", download=download) == tmp_path
    assert resolve_model("gpt2", download=download) == tmp_path
    assert asked == [("meta-llama/Llama-3.2-1B", "main"), ("gpt2", None)]


# Which HTTP client makes it depends on the version of the Hub's client.
RESPONSE: Any = types.SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.RepositoryNotFoundError("404", response=RESPONSE), "neither a folder here nor a Hub repository"),
        (errors.GatedRepoError("403", response=RESPONSE), "is gated: .*HF_TOKEN"),
        (errors.RevisionNotFoundError("404", response=RESPONSE), "has no revision 'v9'"),
        (errors.LocalEntryNotFoundError("gone"), "at revision 'v9' is neither a folder here nor in the Hub cache"),
        (errors.HFValidationError("bad"), "neither a folder here nor a Hub repository"),
        (
            errors.HfHubHTTPError("502 bad gateway", response=RESPONSE),
            "cannot be fetched from the Hub: 502 bad gateway",
        ),
        (RuntimeError("no route"), "cannot be fetched from the Hub: no route"),
        (OSError(28, "No space left on device"), "cannot be fetched from the Hub: .*No space left"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_name_the_model(error, says):
    def download(*_, **__):
        raise error

    with pytest.raises(ValueError, match=f"model 'org/model'.*{says}"):
        resolve_model("org/model", revision="v9", download=download)


def test_offline_mode_is_honoured(tmp_path):
    """The real client, in a process of its own: it reads HF_HUB_OFFLINE and HF_HOME when it is imported."""
    snapshot = tmp_path / "hub" / "models--org--cached" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "hub" / "models--org--cached" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    script = (
        "from paddock.checkpoints import resolve_model\n"
        "print(resolve_model('org/cached'))\n"
        "try: resolve_model('org/absent')\n"
        "except ValueError as error: print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HF_TOKEN")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    assert first == str(snapshot)
    assert (
        second
        == "model 'org/absent' is neither a folder here nor in the Hub cache (HF_HOME), and HF_HUB_OFFLINE is set"
    )
