"""What an optimizer's state says about training: a flat dict to log, and a plot of it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from eva_optax._probes.layers import layer_names, take_apart
from eva_optax._probes.layout import find_stacked
from eva_optax._probes.probe import COUNTER, MOMENT, TRACE, Path, is_probe
from eva_optax._transforms.kept import Scalars
from eva_optax._transforms.state import CenterState, ConjugateState, ScaleByEvaState, ShampooState, SketchState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = ScaleByEvaState | ConjugateState | SketchState | ShampooState

_TITLES = {
    "nu": "step-size factor ν",
    "skipped": "skipped layers, in all",
    "untapped": "steps without vectors, in all",
    "cosine": "share of the gradient along the direction (cosine)",
    "explained": "share of the inputs' mean square in the directions of the sketch",
    "norm_a": "norm of the mean input ‖a‖",
    "norm_b": "norm of the summed cotangent ‖b‖",
    "norm": "norm of the means ‖V‖",
    "trace": "mean square of the inputs",
    "condition": "condition number of the second moments, damped",
    "age": "age of the roots, in steps",
}


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
    "<layer>/explained"  the share of it that lies in the directions of the sketch (`conjugate`)
    "<name>/condition"   the largest condition number that a parameter's roots were made of (`scale_by_shampoo`)
    "<name>/age"         for how many steps its oldest roots are kept; "<name>[2]" is the third of the parameters of one
                         shape whose names differ in numbers alone, of which "<name>" is the first
    ===================  ===============================================================================================

    Cosines come from sums that the update takes anyway, norms from the averages in the state. A scanned layer has one
    entry for each of its layers, "<layer>[2]/cosine"; groups of a convolution are averaged.

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


def plot_diagnostics(history: Sequence[Mapping[str, ArrayLike]], steps: Sequence[int] | None = None) -> "Figure":
    """Plots a history of `diagnostics` over training: a panel for each quantity, a line for each layer.

    Args:
      history: what `diagnostics` returned at each logged step.
      steps: the numbers of these steps; 0, 1, 2, … by default.

    Returns:
      A matplotlib figure, to be shown or saved with ``figure.savefig("diagnostics.png")``.

    Raises:
      ValueError: if the history is empty, or `steps` has another length.
      ImportError: if matplotlib is not installed.

    Source: this library.

    Example:
      >>> import eva_optax
      >>> history = [{"nu": 1.0, "head/cosine": 0.5}, {"nu": 0.5, "head/cosine": 0.25}]
      >>> figure = eva_optax.plot_diagnostics(history, steps=[0, 10])
      >>> [axis.get_title() for axis in figure.axes]
      ['step-size factor ν', 'share of the gradient along the direction (cosine)']
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("eva_optax.plot_diagnostics needs matplotlib: pip install matplotlib") from error
    if not history:
        raise ValueError(
            "eva_optax.plot_diagnostics: history is empty. Give it what diagnostics returned, step by step."
        )
    steps = range(len(history)) if steps is None else steps
    if len(steps) != len(history):
        raise ValueError(f"eva_optax.plot_diagnostics: got {len(steps)} steps for a history of {len(history)}.")

    panels: dict[str, list[str]] = {}
    for key in history[0]:
        panels.setdefault(key.rpartition("/")[2], []).append(key)
    figure = Figure(figsize=(9, 2.4 * len(panels)), layout="constrained")
    for axis, (quantity, keys) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        colors = colormaps["viridis"](np.linspace(0, 0.9, len(keys)))
        for key, color in zip(keys, colors, strict=True):
            axis.plot(steps, [float(np.asarray(entry[key])) for entry in history], color=color, label=key)
        axis.set_title(_TITLES.get(quantity, quantity), fontsize="medium")
        if 1 < len(keys) <= 12:
            axis.legend([key.rpartition("/")[0] for key in keys], fontsize="x-small", loc="center left")
    figure.axes[-1].set_xlabel("step")
    return figure


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
        if isinstance(node, ConjugateState | SketchState):
            yield from _find(node.inner)


def _unboxed(state: Any) -> Any:
    """A state whose single arrays are without the boxes that an optimizer of NNX puts around them."""
    trees = ("vectors", "inner", "bases", "statistics", "roots", "second_moments", "means", "observed")
    return state._replace(**{n: jax.tree.leaves(getattr(state, n))[0] for n in state._fields if n not in trees})


def averages_by_layer(state: Any) -> tuple[dict[Path, dict[str, Array]], dict[Path, str]]:
    """The averages in a state by place and name, those of Eva-s under "means"; and the names of tapped layers."""
    layers: dict[Path, dict[str, Array]] = {}
    for path, leaf in take_apart(state.vectors).items():
        place, name = (path[:-1], path[-1]) if is_probe(path) else (path, "means")
        layers.setdefault(place, {})[name] = leaf
    return layers, layer_names(path for path in layers if is_probe(path))


def _report(state: State) -> Iterator[tuple[str, Array]]:
    if isinstance(state, ShampooState):
        yield from _report_roots(state)
        return
    if isinstance(state, ScaleByEvaState):
        yield "nu", state.nu
    yield "skipped", state.skipped
    yield "untapped", state.untapped
    layers, names = averages_by_layer(state)
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
                if name == MOMENT:
                    continue
                chosen = dict(zip([axis for _, axis in stacked], position, strict=True))
                part = average[tuple(chosen.get(axis, slice(None)) for axis in range(average.ndim))]
                if name == TRACE:
                    yield f"{key}/trace".removeprefix("/"), jnp.sum(part)
                else:
                    yield f"{key}/norm_{name}".removeprefix("/"), jnp.linalg.norm(part.ravel())
            if not isinstance(state, CenterState):
                share = "explained" if TRACE in averages else "cosine"
                yield f"{key}/{share}".removeprefix("/"), cosine[index]


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
