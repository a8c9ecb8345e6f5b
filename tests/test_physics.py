"""The physics-informed example runs with few steps, and every optimizer in it learns."""

from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def as_a_user():
    """A user's session has JAX's own settings."""
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", before)


@pytest.mark.slow
def test_every_optimizer_brings_the_network_closer_to_the_known_solution(as_a_user, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import physics

    results = physics.main(["--small", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert list(results) == list(physics.OPTIMIZERS)
    for name, result in results.items():
        assert name in printed
        assert result.loss[0, -1] < result.loss[0, 0], name
        assert result.error[0, -1] < result.error[0, 0], name
    assert (tmp_path / "physics.png").stat().st_size
