"""What an optimizer's state says about training, as a flat dict to log."""

from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eva_optax._probes.layers import layer_names, take_apart
from eva_optax._probes.layout import find_stacked
from eva_optax._probes.linear_map import statistic_of
from eva_optax._probes.probe import COUNTER, Path, is_probe
from eva_optax._probes.statistics import FACTORS, MOMENT, TRACE
from eva_optax._transforms.averages import has_weights
from eva_optax._transforms.kept import Scalars
from eva_optax._transforms.state import (
    CenterState,
    ConjugateState,
    ScaleByEvaState,
    ScaleByKfacState,
    ShampooState,
)

State = ScaleByEvaState | ConjugateState | CenterState | ScaleByKfacState | ShampooState


def diagnostics(state: Any) -> dict[str, Array]:
    r"""What the optimizer found at its last step, as a flat dict for TensorBoard, W&B or a CSV file.

    ===================  ===============================================================================================
    "nu"                 the step-size factor ν
    "skipped"            how many times a layer was skipped because its vectors were broken
    "untapped"           in how many steps tapped layers had gradients and none had vectors; see `check`
    "<layer>/cosine"     :math:`\langle G, V \rangle / (\|G\| \|V\|)`: how much of the gradient lies along the Kronecker
                         direction V = ab (`scale_by_eva`), the mean input (`scale_by_eva_f`, `conjugate`), or the
                         product of its means (`scale_by_eva_s`)
    "<layer>/norm_a"     ‖a‖ of the running mean input, without the bias's 1
    "<layer>/norm_b"     ‖b‖ of the running summed cotangent
    "<kernel>/norm"      ‖V‖ (`scale_by_eva_s`)
    "<layer>/trace"      the mean square of the layer's inputs, where the model is tapped with a rank
    "<layer>/explained"  the share of it that lies in the directions of the sketch (`conjugate`, `scale_by_eva_f`)
    "<layer>/condition"  the condition number of what its gradient is multiplied by, when that was made
                         (`scale_by_foof`, `scale_by_kfac`, `conjugate` and `scale_by_eva_f` for second moments); of
                         inverses of whole matrices in the 1-norm
    "<layer>/residual"   its residual then, along one vector: from 0.1 on it is not used, and the old one is kept
    "<layer>/age"        steps since then
    "<name>/condition"   the largest condition number that a parameter's roots were made of (`scale_by_shampoo`)
    "<name>/age"         for how many steps its oldest roots are kept; "<name>[2]" is the third of the parameters of one
                         shape whose names differ in numbers alone, of which "<name>" is the first
    ===================  ===============================================================================================

    Cosines come from sums that the update takes anyway, norms from the averages in the state; with `scale_by_foof` and
    `scale_by_kfac`, and `scale_by_eva_f` for sketches, they are those of gradient and update. A scanned layer has one
    entry for each of its layers, "<layer>[2]/cosine"; groups of a convolution are averaged. Of condition, residual and
    age there is one, the largest, and beside cosines one of "explained", the mean.

    Args:
      state: an optimizer's state with a state of this library anywhere in it, or an `nnx.Optimizer`. Where there are
        several, the keys begin with "0/", "1/", in their order.

    Returns:
      Scalars by name. Works under `jit` too; `jax.device_get` makes numbers of them.

    Raises:
      ValueError: if there is no such state.

    Source: this library.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = {"head": model.init(jax.random.key(0), x)["params"]}
      >>> tx = optax.chain(eva_optax.scale_by_eva(), optax.sgd(0.1))
      >>> grads = jax.grad(lambda p: model.apply({"params": p["head"]}, x).sum())(params)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> {name: round(float(value), 3) for name, value in eva_optax.diagnostics(state).items()}
      {'nu': 1.0, 'skipped': 0.0, 'untapped': 0.0, 'head/norm_a': 1.732, 'head/norm_b': 5.657, 'head/cosine': 1.0}
    """
    states = find_states("diagnostics", state)
    if len(states) == 1:
        return dict(_report(states[0]))
    return {f"{index}/{name}": value for index, part in enumerate(states) for name, value in _report(part)}


def find_states(caller: str, tree: Any) -> list[State]:
    """The states of this library in `tree`, also inside one another, in their order.

    Raises:
      ValueError: if there are none.
    """
    found = list(_find(tree))
    if not found:
        *names, last = (kind.__name__ for kind in get_args(State))
        raise ValueError(
            f"eva_optax.{caller}: there is no {', '.join(names)} or {last} in the state of type "
            f"{type(tree).__name__}. Give it the state of an optimizer that has a transformation of eva_optax in it."
        )
    return found


def _find(tree: Any) -> Iterator[State]:

    def ours(node: Any) -> bool:
        return isinstance(node, State)

    for node in jax.tree.leaves(tree, is_leaf=ours):
        if ours(node):
            yield _unboxed(node)
        if isinstance(node, ConjugateState | CenterState):
            yield from _find(node.inner)


def _unboxed(state: Any) -> Any:
    """A state whose single arrays are without the boxes that an optimizer of NNX puts around them."""
    trees = "vectors", "inner", "bases", "inverses", "statistics", "roots", "second_moments", "means", "observed"
    return state._replace(**{n: jax.tree.leaves(getattr(state, n))[0] for n in state._fields if n not in trees})


def averages_by_layer(state: Any) -> tuple[dict[Path, dict[str, Array]], dict[Path, str]]:
    """The averages in a state by place and name, those of Eva-s under "means"; and the names of tapped layers."""
    layers: dict[Path, dict[str, Array]] = {}
    for path, leaf in take_apart(state.vectors).items():
        place, name = (path[:-1], path[-1]) if is_probe(path) else (path, "means")
        layers.setdefault(place, {})[statistic_of(name)] = leaf
    return layers, layer_names(path for path in layers if is_probe(path))


def _report(state: State) -> Iterator[tuple[str, Array]]:
    if isinstance(state, ShampooState):
        yield from _report_roots(state)
        return
    if isinstance(state, ScaleByEvaState | ScaleByKfacState):
        yield "nu", state.nu
    yield "skipped", state.skipped
    yield "untapped", state.untapped
    layers, names = averages_by_layer(state)
    sketched = {names[path] for path, averages in layers.items() if TRACE in averages}
    cosines = iter(state.scalars[len(state.scalars) // 2 :])
    for path, averages in layers.items():
        counter = averages.pop(COUNTER, None)
        stacked: tuple[tuple[int, int], ...] = ()
        if counter is None:
            cosine = next(cosines)[None]
        else:
            shapes = averages["a"].shape, getattr(averages.get("b"), "shape", None), counter.shape
            numbers, stacked = find_stacked(*shapes, len(Scalars._fields))
            cosine = jax.lax.index_in_dim(counter, 1, numbers).ravel()
        if path not in names:
            yield f"{'/'.join(path)}/norm", jnp.prod(jnp.linalg.norm(averages["means"], axis=1))
            yield f"{'/'.join(path)}/cosine", cosine[0]
            continue
        sizes = [averages["a"].shape[axis] for _, axis in stacked]
        for index, position in enumerate(np.ndindex(*sizes)):
            key = f"{names[path]}[{','.join(map(str, position))}]" if stacked else names[path]
            for name, average in averages.items():
                if name in (MOMENT, *FACTORS):
                    continue
                chosen = dict(zip([axis for _, axis in stacked], position, strict=True))
                part = average[tuple(chosen.get(axis, slice(None)) for axis in range(average.ndim))]
                if name == TRACE:
                    yield f"{key}/trace".removeprefix("/"), jnp.sum(part)
                else:
                    yield f"{key}/norm_{name}".removeprefix("/"), jnp.linalg.norm(part.ravel())
            if not isinstance(state, CenterState):
                whitened = isinstance(state, ConjugateState) and has_weights(averages)
                yield f"{key}/{'explained' if whitened else 'cosine'}".removeprefix("/"), cosine[index]
    held = state.inverses if isinstance(state, ScaleByKfacState) else getattr(state, "bases", {})
    for name, inverse in held.items():
        if isinstance(state, ScaleByKfacState) and name in sketched:
            yield f"{name}/explained".removeprefix("/"), jnp.mean(jax.tree.leaves(inverse.inputs.explained)[0])
        for figure in ("condition", "residual", "age"):
            yield f"{name}/{figure}".removeprefix("/"), jnp.max(jax.tree.leaves(getattr(inverse, figure))[0])


def _report_roots(state: ShampooState) -> Iterator[tuple[str, Array]]:
    yield "skipped", state.skipped
    roots = state.roots if isinstance(state.roots, dict) else {}
    for name, regions in roots.items():
        if not regions:
            continue
        conditions, steps = (
            jnp.concatenate([jax.tree.leaves(getattr(root, field))[0].squeeze((2, 3)) for root in regions], 1)
            for field in ("condition", "step")
        )
        for index in range(len(conditions)):
            key = f"{name}[{index}]" if len(conditions) > 1 else name
            yield f"{key}/condition".removeprefix("/"), jnp.max(conditions[index])
            yield f"{key}/age".removeprefix("/"), state.count - jnp.min(steps[index])
