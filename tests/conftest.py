"""What all tests share. Eight virtual CPU devices, so that sharding is tested on any machine.

Most of a test's time is XLA's compiler, and most of its memory the compiled programs. So a module's tests share a
process (the battery's, those of a solver), whose programs are given back when they have grown; and where the slow tests
are left out, so are LLVM's optimizations, which change neither a program's operations nor its buffers, XLA's newer and
slower emitter of loops, and the parts into which it splits a program for other cores, which our two have no time for.
There, a program that took long is compiled once: it lies in a folder that all processes of the run share, and that goes
with it. Python looks for garbage less often among the millions of objects that JAX keeps, which saves a ninth of the
processor's time.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import matplotlib
import pytest

matplotlib.use("Agg")
LONG = frozenset((Path(__file__).parent / "long.txt").read_text().splitlines())
MOST_BYTES = 2**30  # of a process before its programs are given back
PROGRAMS = pytest.StashKey[str]()
LONG_COMPILATIONS = {"jax_persistent_cache_min_compile_time_secs": 0.05, "jax_persistent_cache_min_entry_size_bytes": 0}


def pytest_configure(config: pytest.Config) -> None:
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    if "not slow" in config.option.markexpr:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # which other processes have from the one that began the run
            config.stash[PROGRAMS] = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="eki-jax-tests-")
        for name, value in LONG_COMPILATIONS.items():
            jax.config.update(name, value)
            os.environ.setdefault(name.upper(), str(value))
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["XLA_FLAGS"] = f"--xla_cpu_parallel_codegen_split_count=1 {os.environ['XLA_FLAGS']}"
        if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA exits at a flag that it does not know
            os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ['XLA_FLAGS']}"


def pytest_unconfigure(config: pytest.Config) -> None:
    if PROGRAMS in config.stash:
        del os.environ["JAX_COMPILATION_CACHE_DIR"]
        shutil.rmtree(config.stash[PROGRAMS], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What ``long.txt`` names is slow: variations and deepenings of what a quicker test holds already."""
    for item in items:
        if item.nodeid in LONG:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that share programs share a process: those of a file, and in the battery those of a solver."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, test = nodeid.partition("::")
            solver = test.partition("[")[2].partition("-")[0]
            return f"{path}::{solver}" if path == "tests/solvers/test_battery.py" else path

    return Scheduling(config, log)


def resident_bytes() -> int:
    """The process's memory, where the system says it as Linux does."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    yield
    if resident_bytes() > MOST_BYTES:
        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # the C library keeps what LLVM freed


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimized() -> Iterator[None]:
    """Programs as users have them, for what two of them must round alike."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
