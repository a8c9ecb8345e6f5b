"""`scale_by_shampoo` and `shampoo`: the numbers of the public code, dense oracles, faults, and what Optax does around."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from eva_optax._curvature.blocks import find_blocks, merge_axes
from tests.helpers import assert_close

FOLDER = Path(__file__).parent / "reference"
FILES = sorted(path.stem for path in FOLDER.glob("shampoo_*.npz"))
GRAFT = {0: None, 1: "grad", 2: "adam"}


def options_of(file: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "epsilon": float(file["epsilon"]),
        "relative": False,
        "decay": float(file["beta2"]),
        "block": int(file["max_preconditioner_dim"]),
        "merge": bool(file["merge_dims"]),
        "every": int(file["precondition_frequency"]),
        "start": int(file["start_preconditioning_step"]),
        "graft": GRAFT[int(file["graft"])],
        "graft_decay": float(file["graft_beta2"]),
        "graft_epsilon": float(file["graft_epsilon"]),
        "b1": float(file["beta1"]),
    }


def replay(file: dict[str, np.ndarray], tx: Any) -> Any:
    """Updates and states of all steps, from the stored gradients and parameters."""
    names = [f"p{index}" for index in range(int(file["num_params"]))]
    grads = {name: jnp.asarray(file[f"{name}.grad"]) for name in names}
    init = {name: jnp.asarray(file[f"{name}.init"]) for name in names}
    params = {name: jnp.concatenate([init[name][None], file[f"{name}.param"][:-1]]) for name in names}

    def step(state, inputs):
        updates, state = tx.update(inputs[0], state, inputs[1])
        return state, (updates, state)

    return jax.jit(lambda: jax.lax.scan(step, tx.init(init), (grads, params))[1])()


def blocks_of(file: dict[str, np.ndarray], name: str, options: dict[str, Any]) -> Any:
    """For each block of the file: its key, its place in ours (region, index), and its slices of the merged tensor."""
    ours = find_blocks(file[f"{name}.init"].shape, options["block"], options["merge"])
    assert ours.merged == tuple(file[f"{name}.merged_shape"])
    places = {}
    for region, (start, counts, block) in enumerate(ours.regions):
        for index, place in enumerate(np.ndindex(counts)):
            places[tuple(np.add(start, np.multiply(place, block)))] = region, index, block
    assert len(places) == file[f"{name}.num_blocks"]
    for number in range(len(places)):
        key = f"{name}.b{number}"
        start, stop = (file[f"{key}.{end}"] for end in ("start", "stop"))
        region, index, block = places[tuple(start)]
        assert tuple(start + block) == tuple(stop)
        slices = tuple(slice(*ends) for ends in zip(start, stop, strict=True))
        yield (
            key,
            region,
            index,
            lambda tensor, s=slices: np.asarray(tensor).reshape(-1, *ours.merged)[(slice(None), *s)],
        )


@pytest.mark.parametrize("name", FILES)
def test_statistics_roots_directions_and_steps_are_those_of_the_public_code(name, x64):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as opened:
        file = dict(opened)
    options, used = options_of(file), file["used_shampoo"].astype(bool)
    close = partial(assert_close, tolerance=1e-10, floor=0.0)
    # Eigenvalues of exactly ε are known to float64's resolution of the largest one, relative to ε.
    close_roots = partial(assert_close, tolerance=1e-9 if options["epsilon"] < 1e-4 else 1e-10, floor=0.0)
    made, states = replay(file, eva_optax.scale_by_shampoo(**options))
    plain, _ = replay(file, eva_optax.scale_by_shampoo(**options | {"graft": None}))
    whole = {"momentum": float(file["momentum"]), "nesterov": bool(file["nesterov"])}
    whole["weight_decay"] = float(file["weight_decay"])
    deltas, _ = replay(file, eva_optax.shampoo(float(file["lr"]), **options, **whole))
    for parameter in made:
        for key, region, index, cut in blocks_of(file, parameter, options):
            roots = states.roots[parameter][region]
            for axis, statistic in enumerate(states.statistics[parameter][region]):
                close(statistic[:, index], file[f"{key}.stat{axis}"])
                close_roots(roots.matrices[axis][:, index], file[f"{key}.root{axis}"])
            close(cut(made[parameter]), file[f"{key}.pre"])
            close(cut(plain[parameter])[used], file[f"{key}.shampoo_dir"][used])
            close(cut(deltas[parameter]), file[f"{key}.delta"])
            if options["graft"] == "adam":
                close(cut(states.second_moments[parameter]), file[f"{key}.graft_v"])
            if options["b1"] > 0:
                close(cut(states.means[parameter]), file[f"{key}.exp_avg"])
