"""Settings of the tests: eight CPU devices, quick compilation, no rank promotion, float64 where a test asks for it."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Most tests compile far longer than they run, so that optimized code would not pay.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true " + os.environ.get("XLA_FLAGS", "")
).strip()

import jax
import pytest
from hypothesis import Phase, settings

jax.config.update("jax_numpy_rank_promotion", "raise")

# Few examples, the same in every run: each one compiles. `pytest --hypothesis-profile=thorough` looks for new ones.
_PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=8, phases=_PHASES)
settings.register_profile("thorough", deadline=None, max_examples=300, phases=_PHASES)
settings.load_profile("quick")


@pytest.fixture
def x64():
    """Runs the test with 64-bit numbers."""
    with jax.enable_x64(True):
        yield
