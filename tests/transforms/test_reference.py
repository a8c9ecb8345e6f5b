"""The numbers of the authors' PyTorch code: taps, preconditioned gradients, ν, and whole training runs.

The files in `reference/` hold float64 results of the reference implementation; its layouts and its second average over
batch and positions are undone here. Each array is compared relative to its largest entry.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests import helpers
from tests.dense import probe
from tests.helpers import averages

FOLDER = Path(__file__).parent / "reference"
FILES = ["eva_cnn_ce", "eva_mlp_bias_ce", "eva_mlp_nobias_mse", "eva_mlp_noclip_fd005", "eva_mlp_sub64_defaults"]
FILES += ["eva_seq_rescale"]
CONVOLUTION = 1


@contextmanager
def opened(name: str) -> Iterator[dict[str, np.ndarray]]:
    with jax.enable_x64(True), np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        yield dict(file)


def assert_close(got: Any, want: np.ndarray) -> None:
    helpers.assert_close(np.asarray(got), want, 1e-10, floor=0.0)


def to_flax(weight: np.ndarray) -> np.ndarray:
    """(out, in) to (in, out); (out, in, kh, kw) to (kh, kw, in, out)."""
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def patch_to_flax(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A vector over inputs, for a convolution over (channel, row, column), as the probe's a."""
    return to_flax(rows.reshape(1, *weight.shape[1:]))


def cotangent_to_flax(columns: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return columns.reshape(*(1,) * (weight.ndim - 1), -1)


class Network(nn.Module):
    """The network that a file describes; channels last inside, channels first where it is flattened."""

    file: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        file, count = self.file, int(self.file["num_layers"])
        images = x.ndim == 4
        x = x.transpose(0, 2, 3, 1) if images else x
        for index in range(count):
            key = f"layer{index}"
            features, bias = file[f"{key}.weight_init"].shape[0], bool(file[f"{key}.has_bias"])
            if file[f"{key}.kind"] == CONVOLUTION:
                window = file[f"{key}.weight_init"].shape[2:]
                strides = tuple(file[f"{key}.stride"].tolist())
                padding = [(p, p) for p in file[f"{key}.padding"].tolist()]
                layer = nn.Conv(features, window, strides, padding, use_bias=bias, param_dtype=float, name=key)
            else:
                if x.ndim == 4:
                    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
                layer = nn.Dense(features, use_bias=bias, param_dtype=float, name=key)
            x = layer(x)
            x = nn.relu(x) if file[f"{key}.relu_after"] else x
        return x

    def loss(self, params: Any, x: np.ndarray, y: np.ndarray) -> jax.Array:
        output = eva_optax.tap(self).apply({"params": params}, x)
        if self.file["loss_kind"] == 0:
            return optax.softmax_cross_entropy_with_integer_labels(output, y).mean()
        return jnp.mean(jnp.square(output - y))


def layer_names(file: dict[str, np.ndarray]) -> list[str]:
    return [f"layer{index}" for index in range(int(file["num_layers"]))]


def parameters(file: dict[str, np.ndarray], step: int) -> dict[str, Any]:
    """The parameters that step `step` starts from."""
    params = {}
    for key in layer_names(file):
        weight = file[f"{key}.weight_init"] if step == 0 else file[f"{key}.weight"][step - 1]
        params[key] = {"kernel": jnp.asarray(to_flax(weight), float)}
        if file[f"{key}.has_bias"]:
            bias = file[f"{key}.bias_init"] if step == 0 else file[f"{key}.bias"][step - 1]
            params[key]["bias"] = jnp.asarray(bias, float)
    return params


def stored_gradients(file: dict[str, np.ndarray], step: int) -> dict[str, Any]:
    """Raw gradients with the reference's own vectors of this batch in the probes."""
    grads = {}
    for key in layer_names(file):
        weight, bias = file[f"{key}.weight_init"], bool(file[f"{key}.has_bias"])
        rows = file[f"{key}.a_new"][step]
        a = patch_to_flax(rows[:-1] if bias else rows, weight)
        b = cotangent_to_flax(file[f"{key}.g_new"][step], weight)
        grads[key] = {"kernel": jnp.asarray(to_flax(file[f"{key}.grad_weight"][step]))}
        if bias:
            grads[key]["bias"] = jnp.asarray(file[f"{key}.grad_bias"][step])
        name, counter = ("kernel,bias", (1,)) if bias else ("kernel", (1,) * weight.ndim)
        grads[key]["kronecker"] = {name: probe(a, b, counter)}
    return grads


def step_rule(file: dict[str, np.ndarray]) -> dict[str, Any]:
    if file["kl_clip"] > 0:
        return {"step_rule": "kl_clip", "kl_clip": float(file["kl_clip"])}
    return {"step_rule": "grad_norm" if file["kl_clip"] == 0 else "none"}


@pytest.mark.parametrize("name", FILES)
def test_taps_reproduce_vectors_and_gradients(name: str):
    with opened(name) as file:
        network = Network(file)
        params = eva_optax.attach(network, parameters(file, 0), file["x"][0].astype(float))
        gradient = jax.jit(jax.grad(network.loss))
        for step in range(int(file["num_steps"])):
            stripped = parameters(file, step)
            params = {key: params[key] | stripped[key] for key in params}
            grads = gradient(params, file["x"][step].astype(float), file["y"][step])
            vectors = eva_optax.vectors(grads)
            for key in layer_names(file):
                weight = file[f"{key}.weight_init"]
                assert_close(vectors[key].a, patch_to_flax(file[f"{key}.a_bar"][step], weight))
                assert_close(vectors[key].b, cotangent_to_flax(file[f"{key}.b_bar"][step], weight))
                assert_close(grads[key]["kernel"], to_flax(file[f"{key}.grad_weight"][step]))
                if file[f"{key}.has_bias"]:
                    assert_close(grads[key]["bias"], file[f"{key}.grad_bias"][step])


@pytest.mark.parametrize("name", FILES)
def test_transformation_reproduces_preconditioned_gradients_and_nu(name: str):
    with opened(name) as file:
        rates = jnp.asarray(file["lr"])
        decay = 1 - float(file["factor_decay"])  # the reference weighs the new value
        tx = eva_optax.scale_by_eva(
            float(file["damping"]), relative=False, decay=decay, learning_rate=lambda t: rates[t], **step_rule(file)
        )
        state, update = tx.init(stored_gradients(file, 0)), jax.jit(tx.update)
        for step in range(int(file["num_steps"])):
            updates, state = update(stored_gradients(file, step), state)
            assert_close(state.nu, file["nu"][step])
            for key in layer_names(file):
                weight, bias = file[f"{key}.weight_init"], bool(file[f"{key}.has_bias"])
                running = averages(state, key)
                rows = file[f"{key}.m_a"][step]
                assert_close(running["a"], patch_to_flax(rows[:-1] if bias else rows, weight))
                assert_close(running["b"], cotangent_to_flax(file[f"{key}.m_g"][step], weight))
                assert_close(updates[key]["kernel"], to_flax(file[f"{key}.pre_weight"][step]))
                if bias:
                    assert_close(updates[key]["bias"], file[f"{key}.pre_bias"][step])


@pytest.mark.parametrize("name", [name for name in FILES if "noclip" not in name and "rescale" not in name])
def test_eva_alias_reproduces_training(name: str):
    """Momentum, coupled weight decay and learning rate on top: the parameters after every step."""
    with opened(name) as file:
        rates = jnp.asarray(file["lr"])
        tx = eva_optax.eva(
            lambda t: rates[t],
            float(file["damping"]),
            decay=1 - float(file["factor_decay"]),
            kl_clip=float(file["kl_clip"]),
            momentum=float(file["momentum"]),
            weight_decay=float(file["weight_decay"]),
        )
        params = eva_optax.attach(Network(file), parameters(file, 0), file["x"][0].astype(float))
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(int(file["num_steps"])):
            updates, state = update(stored_gradients(file, step), state, params)
            params = optax.apply_updates(params, updates)
            for key in layer_names(file):
                assert_close(params[key]["kernel"], to_flax(file[f"{key}.weight"][step]))


def test_defaults_are_the_papers():
    """The file with the reference's default damping, clip and decay needs none of them spelled out."""
    with opened("eva_mlp_sub64_defaults") as file:
        tx = eva_optax.eva(float(file["lr"][0]))
        params = eva_optax.attach(Network(file), parameters(file, 0), file["x"][0].astype(float))
        state = tx.init(params)
        for step in range(2):
            updates, state = jax.jit(tx.update)(stored_gradients(file, step), state, params)
            params = optax.apply_updates(params, updates)
        assert_close(params["layer0"]["kernel"], to_flax(file["layer0.weight"][1]))
