"""Calls of the public callables that need an extra: optax, flax, decaying flows, devices, graphs, files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from flax import nnx
from fuzz.calls import (
    BATCH,
    COT,
    ENS,
    FN,
    KEY,
    KEYED,
    OPEN,
    OUT,
    PARAMS,
    POS,
    PRIOR,
    PRIORED,
    SLOPES,
    SQUARES,
    Call,
    U,
    X,
    Y,
    classes,
    drawn,
    kernel_options,
    linear,
    made,
    steps,
    told,
)
from jax.sharding import PartitionSpec

import eki_jax
import eki_jax.equinox as eki_equinox
import eki_jax.flax as eki_flax
import eki_jax.optax as eki_optax
from eki_jax import edf, semi_supervised, sharding, training

# Optax.


def chain(make: Callable[..., Any]) -> Callable[..., Any]:
    """One update of a transformation that a function makes."""

    def call(ensemble: Any, outputs: Any, cotangents: Any, **settings: Any) -> Any:
        tx = made(make, **settings)
        zeros = jax.tree.map(jnp.zeros_like, U)
        return tx.update(zeros, tx.init(ensemble), ensemble, outputs=outputs, cotangents=cotangents)[0]

    return call


def transformed(make: Callable[..., Any]) -> Callable[..., Any]:
    """One update of updates that are not zero."""

    def call(updates: Any, **arguments: Any) -> Any:
        extra = {name: arguments.pop(name) for name in ("outputs", "cotangents") if name in arguments}
        tx = made(make, **arguments)
        return tx.update(updates, tx.init(updates), updates, **extra)[0]

    return call


def from_solver(solver: Any, ensemble: Any, outputs: Any, targets: Any) -> Any:
    tx, zeros = made(eki_optax.from_solver, solver=solver), jnp.zeros_like(U)
    return tx.update(zeros, tx.init(ensemble), ensemble, outputs=outputs, targets=targets)[0]


OPTAX: dict[str, Call] = {
    "optax.eki": Call(
        chain(eki_optax.eki),
        {"h0": POS, "eps": ("not negative", 0.5), "ensemble": ENS, "outputs": OUT, "cotangents": COT},
    ),
    "optax.eki, noise": Call(
        chain(eki_optax.eki),
        {"prior": PRIORED, "key": KEYED, "ensemble": ENS, "outputs": OUT, "cotangents": COT},
        is_random=True,
    ),
    "optax.meki": Call(
        chain(eki_optax.meki), {"h0": POS, "momentum": OPEN, "ensemble": ENS, "outputs": OUT, "cotangents": COT}
    ),
    "optax.ensemble_gradient": Call(
        chain(eki_optax.ensemble_gradient), {"ensemble": ENS, "outputs": OUT, "cotangents": COT, **kernel_options}
    ),
    "optax.scale_by_drift_norm": Call(
        transformed(eki_optax.scale_by_drift_norm),
        {"h0": POS, "eps": ("not negative", 0.5), "updates": ENS, "outputs": OUT, "cotangents": COT},
        fine={"updates": ("None",)},
    ),
    "optax.scale_by_nesterov": Call(
        transformed(eki_optax.scale_by_nesterov),
        {"momentum": OPEN, "noise": ("transformation", optax.identity()), "updates": ("inputs", U)},
        fine={"updates": ("None",)},
    ),
    "optax.per_particle": Call(
        transformed(eki_optax.per_particle),
        {"tx": ("transformation", optax.clip_by_global_norm(1.0)), "updates": ("any ensemble", U)},
        fine={"updates": ("a row less", "one row", "None", "nothing")},
    ),
    "optax.add_prior_noise": Call(
        transformed(eki_optax.add_prior_noise),
        {"prior": PRIORED, "key": KEYED, "h0": POS, "updates": ENS, "outputs": OUT, "cotangents": COT},
        is_random=True,
        fine={"updates": ("None",)},
    ),
    "optax.add_tikhonov": Call(
        lambda prior, weight, ensemble: eki_optax.add_tikhonov(prior, weight).update(
            0 * U, optax.EmptyState(), ensemble
        )[0],
        {"prior": PRIORED, "weight": ("not negative", 1.0), "ensemble": ENS},
    ),
    "optax.from_solver": Call(from_solver, {"solver": ("solver", eki_jax.euler(None, SQUARES)), **told}),
    "optax.value_and_extra_args": Call(
        lambda ensemble, batch, **s: eki_optax.value_and_extra_args(**s)(ensemble, batch)[1]["cotangents"],
        {"forward": FN, "loss": ("function", SQUARES), "ensemble": ENS, "batch": BATCH, "chunk_size": ("chunk", 2)},
        fine={"ensemble": ("a row less", "one row", "nothing")},
    ),
}

# Exponentially decaying flows.

OBJECTIVE = edf.Objective(linear, SQUARES)
GRADIENT = (X.T @ -Y).astype(np.float32)
ROOT = ("function of one", lambda w: SLOPES.astype(w.dtype) * w + 0.1 * w**2)
DIAGONAL = np.array([3.0, -2.0, 1.0])


def edf_step(make: Callable[..., Any]) -> Callable[..., Any]:
    def call(updates: Any, params: Any, objective: Any, batch: Any, **settings: Any) -> Any:
        tx = made(make, **settings)
        return tx.update(updates, tx.init(params), params, objective=objective, batch=batch)[0]

    return call


def edf_flow(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, batch, **settings: make(**settings)(0.0, params, batch)


def in_python(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call whose loops are Python's: compiling them anew for every case would take a minute."""

    def run(**arguments: Any) -> Any:
        with jax.disable_jit():
            return call(**arguments)

    return run


def all_or_nothing(solution: Any) -> Any:
    """What solves a system of equations is NaN as a whole where one of them is."""
    return np.where(np.isfinite(solution).all(), solution, np.nan)


def objective_parts(params: Any, batch: Any, **settings: Any) -> Any:
    objective = edf.Objective(**settings)
    value, gradient = objective.value_and_grad(params, batch)
    return value, gradient, objective.gauss_newton(params, batch)(gradient), objective.hessian(params, batch)(gradient)


def accelerated(make: Callable[..., Any]) -> Callable[..., Any]:
    def call(params: Any, **settings: Any) -> Any:
        acceleration = make(**settings)
        return acceleration.update(params, acceleration.init(params), jnp.array(3))[0]

    return call


edf_settings = {
    "learning_rate": POS,
    "krylov_order": ("whole", 2),
    "damping": ("pair of numbers", (1.0, 1.0)),
    "acceleration": ("acceleration", edf.heavy_ball(0.5)),
    "updates": ("array", GRADIENT),
    "params": PARAMS,
    "objective": ("objective", OBJECTIVE),
    "batch": BATCH,
}
flow_settings = {
    "objective": ("objective", OBJECTIVE),
    "krylov_order": ("whole", 3),
    "damping": ("pair of numbers", (1.0, 1.0)),
    "params": PARAMS,
    "batch": BATCH,
}
EDF: dict[str, Call] = {
    "edf.Objective": Call(
        objective_parts,
        {
            "forward": FN,
            "loss": ("function", SQUARES),
            "chunk_size": ("chunk", 2),
            "reduction": ("choice or none", "sum"),
            "params": PARAMS,
            "batch": BATCH,
        },
    ),
    "edf.edf_g": Call(in_python(edf_step(edf.edf_g)), edf_settings),
    "edf.edf_h": Call(edf_step(edf.edf_h), edf_settings | {"krylov_order": ("whole", 1)}),
    "edf.edf_g_flow": Call(in_python(edf_flow(edf.edf_g_flow)), flow_settings, tolerance=1e-2),
    "edf.edf_h_flow": Call(in_python(edf_flow(edf.edf_h_flow)), flow_settings, tolerance=1e-2),
    "edf.heavy_ball": Call(accelerated(edf.heavy_ball), {"momentum": OPEN, "params": PARAMS}),
    "edf.nesterov": Call(accelerated(edf.nesterov), {"friction": POS, "params": PARAMS}),
    "edf.exponential_decay": Call(
        edf.exponential_decay,
        {"t": ("array", np.array([0.5, 1.0], np.float32))},
        lambda t: np.exp(-np.float64(t)),
        fine={"t": ("integers",)},
    ),
    "edf.linear_decay": Call(
        edf.linear_decay,
        {"t": ("array", np.array([0.5, 1.0], np.float32))},
        lambda t: 1 - np.float64(t),
        fine={"t": ("integers",)},
    ),
    "edf.equation_flow": Call(
        lambda params, **s: edf.equation_flow(**s)(0.5, params),
        {"residual": ROOT, "decay": ("function of one", edf.linear_decay), "params": PARAMS},
        lambda params, **s: all_or_nothing(
            -2 * (SLOPES + 0.1 * np.float64(params)) * np.float64(params) / (SLOPES + 0.2 * np.float64(params))
        ),
    ),
    "edf.geodesic_flow": Call(
        lambda position, momentum, residual: edf.geodesic_flow(residual)(0.0, (position, momentum)),
        {"residual": ROOT, "position": PARAMS, "momentum": PARAMS},
    ),
    "edf.geodesic_momentum": Call(
        edf.geodesic_momentum,
        {"residual": ROOT, "params": PARAMS},
        lambda params, residual: (
            -(SLOPES + 0.2 * np.float64(params)) * (SLOPES + 0.1 * np.float64(params)) * np.float64(params)
        ),
    ),
    "edf.minres": Call(
        in_python(lambda **s: edf.minres(**s)[0]),
        {
            "operator": ("function of one", lambda x: DIAGONAL.astype(x.dtype) * x),
            "rhs": PARAMS,
            "iterations": ("whole", 3),
        },
        lambda rhs, **s: all_or_nothing(np.float64(rhs) / DIAGONAL),
    ),
}

# Flax.

IMAGES = np.ones((2, 8, 8, 1), np.float32)


def network(make: Callable[..., Any], x: Any) -> Callable[..., Any]:
    """The shapes of a network that a function makes: as many zeros as a particle has numbers."""

    def call(**settings: Any) -> Any:
        shapes = jax.eval_shape(make(**settings).init, KEY, x)
        return jnp.zeros(sum(leaf.size for leaf in jax.tree.leaves(shapes)))

    return call


def evaluated(make: Callable[..., Any]) -> Callable[..., Any]:
    """The outputs of a model at parameters of a half."""

    def call(module: Any, x: Any, inputs: Any = None, **settings: Any) -> Any:
        forward, template = make(module, x, **settings)
        params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), template)
        return forward(params, x if inputs is None else inputs)

    return call


def nnx_outputs(module: Any, method: Any, x: Any) -> Any:
    forward, template = eki_flax.nnx_forward(module, method=method)
    return forward(jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), template), x)


def equinox_outputs(module: Any, per_sample: Any, x: Any) -> Any:
    forward, template = eki_equinox.equinox_forward(module, per_sample=per_sample)
    return forward(jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), template), x)


def dense_by_hand(x: Any, **rest: Any) -> Any:
    return np.asarray(x) @ np.full((3, 2), 0.5) + 0.5


def sign_by_hand(x: Any) -> Any:
    return np.where(np.isnan(x), x, np.where(np.asarray(x) >= 0, 1.0, -1.0))


LINEN, NNX = nn.Dense(2), nnx.Linear(3, 2, rngs=nnx.Rngs(0))
EQUINOX = eqx.nn.Linear(3, 2, key=KEY)
WEIGHTS = ("array", np.array([0.1, -0.01, 1.5], np.float32))
RELU = ("function of one", jax.nn.relu)
FLAX: dict[str, Call] = {
    "flax.ConvolutionalNetwork": Call(
        network(eki_flax.ConvolutionalNetwork, IMAGES),
        {"stages": ("objects", (eki_flax.Stage((2,), 2, 2),)), "widths": ("sizes", (4, 3)), "activation": RELU},
    ),
    "flax.Stage": Call(
        lambda **s: network(eki_flax.ConvolutionalNetwork, IMAGES)(stages=(eki_flax.Stage(**s),), widths=(3,)),
        {"channels": ("sizes", (2, 3)), "window": ("whole", 2), "stride": ("whole", 2)},
    ),
    "flax.DenseNetwork": Call(network(eki_flax.DenseNetwork, X), {"widths": ("sizes", (4, 3)), "activation": RELU}),
    "flax.ExpertsNetwork": Call(
        network(eki_flax.ExpertsNetwork, X),
        {"experts": ("whole", 3), "width": ("whole", 4), "classes": ("whole", 2)},
    ),
    "flax.SpikingNetwork": Call(
        network(eki_flax.SpikingNetwork, X),
        {"widths": ("sizes", (4, 3)), "steps": ("whole", 2), "leak": ("from 0 to 1", 0.9)},
    ),
    "flax.spike": Call(eki_flax.spike, {"potential": WEIGHTS}, lambda potential: np.float64(potential >= 1)),
    "flax.surrogate_spike": Call(
        eki_flax.surrogate_spike, {"potential": WEIGHTS}, lambda potential: np.float64(potential >= 1)
    ),
    "flax.Int8Network": Call(network(eki_flax.Int8Network, X), {"widths": ("sizes", (4, 3))}),
    "flax.SmallConvolutionalNetwork": Call(
        network(eki_flax.SmallConvolutionalNetwork, np.ones((2, 16, 16, 1), np.float32)),
        {"channels": ("sizes", (2, 2)), "classes": ("whole", 3), "activation": RELU},
    ),
    "flax.TanhRNN": Call(
        network(eki_flax.TanhRNN, np.ones((2, 4, 3), np.float32)),
        {"units": ("whole", 3), "layers": ("whole", 2), "outputs": ("whole", 2), "stacked": ("flag", False)},
    ),
    "flax.dense_network": Call(network(eki_flax.dense_network, X), {"widths": ("sizes", (4, 3)), "activation": RELU}),
    "flax.from_int8": Call(
        eki_flax.from_int8,
        {"integers": ("whole numbers", np.array([6, -1, 127], np.int8)), "dtype": ("dtype", jnp.float32)},
        lambda integers, dtype: np.float64(integers) / 64,
        tolerance=1e-2,
    ),
    "flax.to_int8": Call(
        eki_flax.to_int8, {"weights": WEIGHTS}, lambda weights: np.clip(np.rint(np.float64(weights) * 64), -128, 127)
    ),
    "flax.quantized": Call(
        eki_flax.quantized,
        {"weights": WEIGHTS},
        lambda weights: np.clip(np.rint(np.float64(weights) * 64), -128, 127) / 64,
    ),
    "flax.straight_through_quantized": Call(
        eki_flax.straight_through_quantized,
        {"weights": WEIGHTS},
        lambda weights: np.clip(np.rint(np.float64(weights) * 64), -128, 127) / 64,
    ),
    "flax.sign": Call(eki_flax.sign, {"x": WEIGHTS}, sign_by_hand),
    "flax.straight_through_sign": Call(eki_flax.straight_through_sign, {"x": WEIGHTS}, sign_by_hand),
    "flax.linen_forward": Call(
        evaluated(eki_flax.linen_forward),
        {
            "module": ("module", LINEN),
            "x": ("rows", X),
            "method": ("choice or none", "__call__"),
            "constants": ("mapping", {}),
        },
        dense_by_hand,
        fine={"x": ("complex",)},
    ),
    "flax.low_rank_forward": Call(
        evaluated(eki_flax.low_rank_forward),
        {
            "module": ("module", LINEN),
            "x": ("rows", X),
            "method": ("choice or none", "__call__"),
            "constants": ("mapping", {}),
        },
        dense_by_hand,
        fine={"x": ("complex",)},
    ),
    "equinox.equinox_forward": Call(
        equinox_outputs,
        {"module": ("module", EQUINOX), "per_sample": ("choice", True), "x": ("rows", X)},
        dense_by_hand,
        fine={"x": ("complex",)},
    ),
    "equinox.xavier": Call(
        drawn(eki_equinox.xavier), {"template": ("row", np.zeros((3, 2), np.float32))}, is_random=True
    ),
    "flax.nnx_forward": Call(
        nnx_outputs,
        {"module": ("module", NNX), "method": ("choice", "__call__"), "x": ("rows", X)},
        dense_by_hand,
        fine={"x": ("complex",)},
    ),
}

# Devices.

MESH = sharding.make_mesh(2)
SPREAD, SAME = PartitionSpec("particles"), PartitionSpec()
FEW = ("ensemble of few", U)
MESHED, DRIVEN = ("mesh", MESH), ("choice", "shard_map")
SHARDED = eki_jax.euler(linear, SQUARES, axis_name="particles")
SHARDED_METHOD = training.ensemble_method(
    eki_jax.euler(classes, eki_jax.cross_entropy(), axis_name="particles"), classes, PRIOR, 4, axis_name="particles"
)


def centred(rows: Any) -> Any:
    return rows - jax.lax.pmean(jnp.mean(rows, axis=0), "particles")


def by_samples(forward: Any, params: Any, x: Any) -> Any:
    mesh = sharding.make_mesh(1, 2)
    run = sharding.over_devices(sharding.shard_samples(forward), mesh, (SAME, PartitionSpec("batch")))
    return run(params, x)


sizes = {
    "ensemble_size": ("whole", 8),
    "outputs": ("count", 5),
    "parameters": ("count", 3),
    "devices": ("whole", 4),
    "machine": ("objects", sharding.HOPPER),
    "itemsize": ("whole", 4),
}
SHARDING: dict[str, Call] = {
    "sharding.nearest_sizes": Call(sharding.nearest_sizes, {"size": ("whole", 10), "devices": ("whole", 4)}),
    "sharding.make_mesh": Call(
        lambda **s: jnp.zeros(sharding.make_mesh(**s).shape["particles"]),
        {"particles": ("whole or none", 2), "batch": ("whole", 1), "devices": ("devices", jax.devices()[:2])},
    ),
    "sharding.place": Call(
        sharding.place,
        {"tree": ("inputs", U), "mesh": MESHED, "spec": ("spec", SPREAD)},
        fine={"tree": ("None", "complex"), "mesh": ("explicit axes",)},
    ),
    "sharding.batch_specs": Call(
        lambda mesh: jnp.zeros(len(sharding.batch_specs(mesh))), {"mesh": MESHED}, fine={"mesh": ("explicit axes",)}
    ),
    "sharding.over_devices": Call(
        lambda rows, body, mesh, in_specs, driver: sharding.over_devices(body, mesh, in_specs, driver=driver)(rows),
        {
            "body": ("function of one", centred),
            "mesh": MESHED,
            "in_specs": ("specs", (SPREAD,)),
            "driver": DRIVEN,
            "rows": ("rows", U),
        },
        lambda rows, **s: np.asarray(rows) - np.asarray(rows).mean(0),
        fine={"rows": ("complex",)},
    ),
    "sharding.result_specs": Call(
        lambda rows, **s: jnp.zeros(len(sharding.result_specs(*s.values(), rows))),
        {
            "body": ("function of one", centred),
            "mesh": MESHED,
            "in_specs": ("specs", (SPREAD,)),
            "rows": ("rows", U),
        },
        fine={"mesh": ("explicit axes",), "rows": ("complex",)},
    ),
    "sharding.sample_ensemble": Call(
        sharding.sample_ensemble,
        {"key": ("key of few", KEY), "prior": PRIORED, "particles": ("whole", 4), "mesh": MESHED, "driver": DRIVEN},
        is_random=True,
        fine={"prior": ("of another shape", "of a dictionary")},
    ),
    "sharding.resample_around_mean": Call(
        sharding.resample_around_mean,
        {
            "key": ("key of few", KEY),
            "ensemble": FEW,
            "prior": PRIORED,
            "mesh": MESHED,
            "particles": ("whole or none", 4),
            "scale": ("number of few", 1.0),
            "driver": DRIVEN,
        },
        is_random=True,
    ),
    "sharding.shard_solver": Call(
        steps(sharding.shard_solver),
        {"solver": ("solver", SHARDED), "mesh": MESHED, "driver": DRIVEN, "ensemble": FEW, "batch": BATCH},
    ),
    "sharding.shard_method": Call(
        lambda key, **s: sharding.shard_method(**s).init(key).ensemble,
        {"method": ("method", SHARDED_METHOD), "mesh": MESHED, "driver": DRIVEN, "key": ("key of few", KEY)},
        is_random=True,
    ),
    "sharding.shard_samples": Call(
        by_samples,
        {"forward": FN, "params": ("rows", PARAMS[1]), "x": ("rows", X[:4])},
        lambda params, x, **s: np.asarray(x) @ np.asarray(params),
        fine={"params": ("complex",), "x": ("complex",)},
    ),
    "sharding.step_cost": Call(
        lambda **s: sharding.step_cost(**s),
        {
            "communication": ("choice", "ring"),
            **sizes,
            "forward_flops": ("not negative", 0.0),
            "messages": ("whole", 1),
        },
    ),
    "sharding.natural_step_cost": Call(
        lambda **s: sharding.natural_step_cost(**s),
        {
            **{name: size for name, size in sizes.items() if name != "itemsize"},
            "samples": ("whole", 6),
            "forward_flops": ("not negative", 0.0),
        },
    ),
    "sharding.choose_communication": Call(
        lambda **s: jnp.zeros(len(sharding.choose_communication(**s))), {**sizes, "rounded": ("flag", False)}
    ),
}

# Graphs.

AFFINITY = semi_supervised.gaussian_affinity(X[:, :2], 1.0)
LAPLACIAN = semi_supervised.graph_laplacian(AFFINITY)
BASIS = semi_supervised.eigenbasis(LAPLACIAN)
NODES = np.array([0, 2])


def laplacian_by_hand(weights: Any) -> Any:
    degrees = weights.sum(1)
    return np.eye(len(weights)) - weights / np.sqrt(degrees[:, None] * degrees)


def affinity_by_hand(x: Any, width: Any, neighbours: Any = None) -> Any:
    squares = ((np.float64(x)[:, None] - np.float64(x)) ** 2).sum(-1)
    return np.exp(-squares / (2 * float(width) ** 2))


GRAPHS: dict[str, Call] = {
    "semi_supervised.graph_laplacian": Call(
        semi_supervised.graph_laplacian, {"weights": ("affinity", AFFINITY)}, laplacian_by_hand
    ),
    "semi_supervised.gaussian_affinity": Call(
        semi_supervised.gaussian_affinity, {"x": ("points", X[:, :2]), "width": POS}, affinity_by_hand
    ),
    "semi_supervised.gaussian_affinity, sparse": Call(
        lambda **s: semi_supervised.gaussian_affinity(**s).toarray(),
        {"x": ("points", X[:, :2]), "width": POS, "neighbours": ("chunk", 4)},
        affinity_by_hand,
    ),
    "semi_supervised.eigenbasis": Call(
        lambda **s: semi_supervised.eigenbasis(**s).eigenvalues,
        {"laplacian": ("laplacian", LAPLACIAN), "modes": ("whole or none", 3), "seed": ("seed", 1)},
        lambda laplacian, modes, **s: np.linalg.eigvalsh(
            laplacian.toarray() if scipy.sparse.issparse(laplacian) else np.asarray(laplacian)
        )[: 5 if modes is None else int(modes) + 1],
    ),
    "semi_supervised.fiedler_vector": Call(
        lambda basis: np.abs(semi_supervised.fiedler_vector(basis)), {"basis": ("basis", BASIS)}
    ),
    "semi_supervised.graph_prior": Call(
        lambda **s: semi_supervised.graph_prior(**s).sample(KEY),
        {"basis": ("basis", BASIS), "tau": ("not negative", 0.5), "alpha": POS},
        is_random=True,
    ),
    "semi_supervised.observed_value": Call(
        semi_supervised.observed_value, {"u": ("row", U[0]), "nodes": ("nodes", NODES)}
    ),
    "semi_supervised.observed_sign": Call(
        semi_supervised.observed_sign, {"u": ("row", U[0]), "nodes": ("nodes", NODES)}
    ),
    "semi_supervised.mean_squared_error": Call(
        semi_supervised.mean_squared_error,
        {"outputs": ("row", U[0]), "targets": ("targets", U[1])},
        lambda outputs, targets: np.mean((np.float64(outputs) - targets) ** 2),
    ),
}

# Files.


def saved(directory: Any, settings: Any, number: Any, state: Any, notes: Any) -> Any:
    """What comes back from a checkpoint in a folder within a temporary one."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / directory if isinstance(directory, Path) and not directory.is_absolute() else directory
        place = f"{folder}/{place}" if isinstance(place, str) and not place.startswith("/") else place
        checkpoints = training.Checkpoints(place, settings)
        try:
            checkpoints.save(number, state, notes)
            return checkpoints.restore(lambda notes: jax.tree.map(jnp.zeros_like, state))[0]
        finally:
            checkpoints.close()


FILES: dict[str, Call] = {
    "training.Checkpoints": Call(
        saved,
        {
            "directory": ("folder", Path("run")),
            "settings": ("settings", {"problem": "toy"}),
            "number": ("count", 1),
            "state": ("saved state", {"w": jnp.ones(3)}),
            "notes": ("notes", {"loss": 0.5}),
        },
    )
}
EXTRAS = OPTAX | EDF | FLAX | SHARDING | GRAPHS | FILES
