"""Settings of the tests: eight CPU devices, quick compilation, kept programs, no rank promotion, float64 on request."""

import ctypes
import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads that wait for work take it from the other worker
# Most tests compile far longer than they run, so that optimized code would not pay, nor does splitting small programs
# into many parts for threads that the workers share. The last flag, which newer versions refuse, leaves out MLIR's
# emitters: they take several times as long for each kernel.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1 "
    + ("--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")) else "")
    + os.environ.get("XLA_FLAGS", "")
).strip()

# What one test compiled serves the next, the other worker, and the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from hypothesis import Phase, settings

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(50_000, 50, 50)  # tracing makes much that lives long: looking for garbage takes 6% of the time

# Few examples, the same in every run: each one compiles. `pytest --hypothesis-profile=thorough` looks for new ones.
_PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=5, phases=_PHASES)
settings.register_profile("thorough", deadline=None, max_examples=300, phases=_PHASES)
settings.load_profile("quick")


MOST_BYTES = 15 * 10**8


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Forgets compiled programs once the process holds much: nothing else ever frees them."""
    yield
    held = Path("/proc/self/statm")
    if held.exists() and int(held.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES:
        jax.clear_caches()
        gc.collect()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc keeps what is freed, and the next test would find as much held
            libc.malloc_trim(0)


@pytest.fixture
def x64():
    """Runs the test with 64-bit numbers."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_a_user():
    """Runs the test with JAX's own settings."""
    with jax.numpy_rank_promotion("allow"):
        yield
