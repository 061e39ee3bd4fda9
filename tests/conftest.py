"""Eight virtual CPU devices, strict arithmetic, shapes checked: what every test runs under."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the tests' time was LLVM's, for programs that run for milliseconds. XLA's own passes stay: the programs whose
# text and sizes tests read are the same. The processes that tests start inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(os.environ.get("PADDOCK_TEST_GPU") != "1")))

import jax
import jaxtyping

# XLA's older emitters of loops compile a step in about 0.6 of the time that its MLIR pipelines take. JAX 0.11 has no
# others any more, and does not start with a flag that it does not know.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

ROOT = Path(__file__).parent.parent
ON_GPU = os.environ.get("PADDOCK_TEST_GPU") == "1"
if ON_GPU:
    # Kernel tests start JAX before any engine could ask for its share of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")
else:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Tests share compiled programs between processes and runs, like the product does.
CACHE = ROOT / "build" / "test-compile-cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Annotations are checked at every call: of arrays dtype and axes, of all else the type. It works on what is imported
# from here on, so nothing above may import paddock. The tower: an int will do for a float, as it does for mypy.
PACKAGES = ("checkpoints", "model", "pallas_kernels", "serving", "sharding")
MODULES = {f"paddock.{package}.{path.stem}" for package in PACKAGES for path in (ROOT / package).glob("*.py")}
# Left out: what users hand over may be of any type, and these refuse it in ValueErrors of their own, as tests ask.
JUDGES = ("chat_template", "engine_config", "llm", "sampling_params", "stop", "tokenizer")
CHECKED = MODULES - {f"paddock.serving.{name}" for name in JUDGES}
jaxtyped = jaxtyping.jaxtyped


def is_plain(checked: Any) -> bool:
    """A function of a module that names no axes, with annotations that are all there already."""
    if not inspect.isfunction(checked):
        return False
    imported = (x for name, x in checked.__globals__.items() if name != "__loader__")  # jaxtyping's in any module
    if any(str(getattr(x, "__module__", "")).startswith("jaxtyping") for x in imported):
        return False
    try:
        get_type_hints(checked)
    except NameError:  # for mypy alone, or of a class to come
        return False
    return True


def check(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What the hook puts on everything: beartype alone where nothing has axes, for jaxtyping binds the arguments to
    remember theirs, and that was half the time of tests that run no program."""
    return lambda checked: typechecker(checked) if is_plain(checked) else jaxtyped(checked, typechecker=typechecker)


jaxtyping.jaxtyped = check  # type: ignore[assignment]
jaxtyping.install_import_hook(sorted(CHECKED), "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

GOLDEN = Path(__file__).parent / "model" / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not ON_GPU:
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU and PADDOCK_TEST_GPU=1")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Hugging Face folders of tiny random models with what transformers says of them (see make_golden.py)."""
    return GOLDEN
