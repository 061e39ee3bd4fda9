"""The wheel holds what git holds, works where it is installed, and shadows nobody's modules."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("checkpoints", "model", "pallas_kernels", "serving", "sharding")


def tracked() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout: the wheel is compared with what git tracks")
    return subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a clean copy of the tracked files, so that nothing git does not know can slip in."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    return next(out.glob("paddock-*.whl"))


def test_the_wheel_is_what_git_tracks(wheel: Path) -> None:
    want = {f"paddock/{name}" for name in tracked() if name.split("/")[0] in PACKAGES}
    got = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert got == want
    assert "paddock/checkpoints/bundled/model.safetensors" in got


def test_an_installed_wheel_generates(wheel: Path, tmp_path: Path) -> None:
    """From another folder, beside files named as our packages are."""
    site, work = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(site)
    work.mkdir()
    (work / "model.py").write_text("raise AssertionError('shadowed')")
    (work / "checkpoints").mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import paddock.serving, paddock.serving.llm as llm;"
        "assert llm.__file__.startswith(sys.argv[1]), llm.__file__;"
        "from paddock.serving import LLM, SamplingParams\n"
        "with LLM(max_num_seqs=1, max_num_batched_tokens=32, max_model_len=64, compile_cache_dir=sys.argv[2]) as m:\n"
        "    print(m.generate('ROMEO:', SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].text)"
    )
    cache = ROOT / "build" / "test-compile-cache"
    # -S keeps the editable install's hook out; the libraries come by path.
    libraries = str(Path(pytest.__file__).parent.parent)
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.append({libraries!r})\n{code}", str(site), str(cache)]
    run = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_the_root_is_no_package() -> None:
    assert not (ROOT / "__init__.py").exists()
