"""Learning from what a policy visits: collect, say how good each action was, take steps, and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from eki_jax._checks import function, offers, real, whole
from eki_jax._types import Array, ForwardFn, Params
from eki_jax.kernel.keys import particle_key
from eki_jax.policy.advantages import UNIT, generalized_advantages
from eki_jax.policy.distributions import Distribution, a_distribution
from eki_jax.policy.environments import Environment, check_environment
from eki_jax.policy.loss import Visited
from eki_jax.policy.rollouts import Running, Trajectory, collect, start
from eki_jax.solvers.protocol import Solver


class Part(NamedTuple):
    """What acts, or what says how good a state is: a model and the solver that trains it.

    Attributes:
        forward: function ``forward(params, observations (B, ...)) -> outputs``: the distribution's, or values (B,).
        solver: solver whose ``init`` takes ``(params, key)``, such as :func:`eki_jax.natural.natural_gradient`, with
            :func:`policy_loss` or :func:`eki_jax.squared_error`.
        epochs: number of times that an iteration's states are used.
        batches: number of mini-batches into which an epoch cuts them; 1 for all at once.
    """

    forward: ForwardFn
    solver: Solver
    epochs: int = 1
    batches: int = 1


class LearnerState(NamedTuple):
    """State of a :class:`Learner`.

    Attributes:
        actor: solver's state of the policy.
        critic: solver's state of the values; None without a critic.
        running: copies of the environment in the middle of their episodes.
        scale: exponential average of the returns' squares and of its weights, shape (2,): values are learned in units
            of its root.
        key: data of the key of everything random, uint32.
        count: number of iterations, int32.
        episodes: number of episodes that have ended, int32.
    """

    actor: Any
    critic: Any
    running: Running
    scale: Array
    key: Array
    count: Array  # type: ignore[assignment]  # hides tuple.count
    episodes: Array


class LearnerInfo(NamedTuple):
    """Numbers of one iteration.

    Attributes:
        returns: mean of the returns of the episodes that ended, in units of reward; NaN where none did.
        lengths: mean of their numbers of steps; NaN where none ended.
        episodes: number of episodes that ended, int32.
        divergence: mean Kullback-Leibler divergence of the policy before from the one after, in nats.
        explained: share of the returns' variance that the critic had explained before its steps; NaN without one.
        moved: flag, True where every step of the policy was taken.
        refused: number of the policy's steps that were refused, int32.
        reason: largest code of :class:`eki_jax.Reason` among them, int32; 0 where none was refused.
        critic_refused: number of the critic's steps that were refused, int32.
        critic_reason: largest code of :class:`eki_jax.Reason` among those, int32.
    """

    returns: Array
    lengths: Array
    episodes: Array
    divergence: Array
    explained: Array
    moved: Array
    refused: Array
    reason: Array
    critic_refused: Array
    critic_reason: Array


class Learner(NamedTuple):
    """A policy that learns from what it visits.

    Attributes:
        init: function ``init(params, critic_params, key) -> state``; ``critic_params`` None without a critic.
        step: function ``step(state) -> (state, info)`` of one iteration, for ``jit`` and ``scan``.
        estimate: function ``estimate(state) -> params`` of the policy, to act with.
        steps: number of environment steps of an iteration, all copies together.
    """

    init: Callable[..., LearnerState]
    step: Callable[[LearnerState], tuple[LearnerState, LearnerInfo]]
    estimate: Callable[[LearnerState], Params]
    steps: int


class LearnerSettings(TypedDict, total=False):
    """Keywords of :func:`learner`, which the ready-made learners hand on.

    Attributes:
        copies: number of copies of the environment; by default 16.
        steps: number of steps of each copy in an iteration; by default 128.
        discount: factor in [0, 1] of a reward that is one step later; by default 0.99.
        decay: factor lambda in [0, 1] of the advantages; by default 0.95.
    """

    copies: int
    steps: int
    discount: Any
    decay: Any


def learner(
    environment: Environment,
    distribution: Distribution,
    actor: Part,
    critic: Part | None = None,
    *,
    copies: int = 16,
    steps: int = 128,
    discount: Any = 0.99,
    decay: Any = 0.95,
) -> Learner:
    """A policy gradient learner on any solvers: advantages from a critic, or returns to go without one.

    An iteration takes ``steps`` steps in each of ``copies`` copies of the environment, estimates the advantages
    (:func:`generalized_advantages`; without a critic the returns to go minus the mean of their step over the copies),
    standardizes them, takes the actor's steps on :func:`policy_loss`'s targets, and the critic's towards the returns.

    Args:
        environment: the environment.
        distribution: distribution of the actions, given the actor's outputs.
        actor: model and solver of the policy, with :func:`policy_loss` of the same distribution.
        critic: model and solver of the values, with :func:`eki_jax.squared_error`, or None.
        copies: number of copies of the environment.
        steps: number of steps of each copy in an iteration.
        discount: factor in [0, 1] of a reward that is one step later.
        decay: factor lambda in [0, 1] of the advantages.

    Returns:
        A :class:`Learner`.

    Raises:
        TypeError, ValueError: arguments of another kind, or out of range; batches that do not divide an iteration's
            states.

    >>> import jax, jax.numpy as jnp
    >>> from eki_jax import natural, policy
    >>> forward, distribution = lambda params, x: x @ params, policy.categorical()
    >>> solver = natural.natural_gradient(forward, policy.policy_loss(distribution), 20, norm_constraint=0.02)
    >>> cart_pole = policy.from_gymnax("CartPole-v1")
    >>> agent = learner(cart_pole, distribution, policy.Part(forward, solver), copies=8, steps=64)
    >>> state, info = jax.jit(agent.step)(agent.init(jnp.zeros((4, 2)), None, jax.random.key(0)))
    >>> bool(info.moved), agent.steps
    (True, 512)
    """
    check_environment(environment), a_distribution(distribution)
    total = whole("copies", copies) * whole("steps", steps)
    _check_part("actor", actor, total)
    if critic is not None:
        _check_part("critic", critic, total)
    real("discount", discount, UNIT), real("decay", decay, UNIT)

    def init(params: Params, critic_params: Params | None, key: Array) -> LearnerState:
        keys = jax.random.split(particle_key("key", key), 4)
        if (critic is None) != (critic_params is None):
            raise TypeError("critic_params: wanted the parameters of the critic, or None where there is none")
        return LearnerState(
            actor.solver.init(params, keys[0]),
            None if critic is None else critic.solver.init(critic_params, keys[1]),
            start(environment, keys[2], copies),
            jnp.zeros(2),
            jax.random.key_data(keys[3]),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def step(state: LearnerState) -> tuple[LearnerState, LearnerInfo]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        acting, shuffling, critic_shuffling = jax.random.split(key, 3)
        params = actor.solver.estimate(state.actor)
        path, running = collect(environment, actor.forward, distribution, params, state.running, acting, steps)
        seen = _flat(path.observations)
        values, next_values = jnp.zeros((2, *path.rewards.shape))
        scale = _root(state.scale)
        if critic is not None:
            critic_params = critic.solver.estimate(state.critic)
            at = lambda x: scale * _flat_values(critic.forward(critic_params, x), total).reshape(steps, copies)
            values, next_values = at(seen), at(_flat(path.next_observations))
        advantages, returns = generalized_advantages(
            path.rewards, values, next_values, path.terminated, path.ended, discount, decay if critic else 1.0
        )
        if critic is None:  # what the same time is usually worth
            advantages = advantages - jnp.mean(advantages, axis=1, keepdims=True)
        outputs = actor.forward(params, seen)
        visited = _flat(Visited(path.actions, _standard(advantages), path.log_probs))._replace(outputs=outputs)
        new, moved, reason = _epochs(actor, state.actor, shuffling, (seen, visited))
        others = actor.forward(actor.solver.estimate(new), seen)
        new_critic, critic_moved, critic_reason, scales = None, jnp.ones(1, bool), jnp.zeros((), jnp.int32), state.scale
        if critic is not None:
            larger = 0.9 * scales + 0.1 * jnp.stack([jnp.mean(returns**2), jnp.ones(())])
            scales = jnp.where(jnp.isfinite(larger[0]), larger, scales)  # the steps are refused then, and say so
            batch = seen, (returns / _root(scales)).ravel()
            new_critic, critic_moved, critic_reason = _epochs(critic, state.critic, critic_shuffling, batch)
        ended = jnp.sum(path.ended, dtype=jnp.int32)
        info = LearnerInfo(
            returns=_mean_at_end(path.returns, path),
            lengths=_mean_at_end(path.lengths, path),
            episodes=ended,
            divergence=jnp.mean(distribution.divergence(outputs, others)),
            explained=1 - jnp.var(returns - values) / jnp.var(returns) if critic else jnp.asarray(jnp.nan),
            moved=jnp.all(moved),
            refused=jnp.sum(~moved, dtype=jnp.int32),
            reason=reason,
            critic_refused=jnp.sum(~critic_moved, dtype=jnp.int32),
            critic_reason=critic_reason,
        )
        following = LearnerState(new, new_critic, running, scales, state.key, state.count + 1, state.episodes + ended)
        return following, info

    def estimate(state: LearnerState) -> Params:
        return actor.solver.estimate(state.actor)

    return Learner(init, step, estimate, total)


def _check_part(name: str, part: Part, total: int) -> None:
    if not isinstance(part, Part):
        raise TypeError(f"{name}: {repr(part)[:80]}; wanted a Part of a model and its solver")
    function(f"{name}.forward", part.forward, "a model, forward(params, observations) -> outputs", arguments=2)
    wanted = "a solver, such as eki_jax.natural.natural_gradient(forward, loss)"
    offers(f"{name}.solver", part.solver, ("init", "step", "estimate"), wanted)
    whole(f"{name}.epochs", part.epochs)
    if total % whole(f"{name}.batches", part.batches):
        raise ValueError(f"{name}.batches: {part.batches}; wanted a divisor of the {total} states of an iteration")


def _epochs(part: Part, state: Any, key: Array, batch: Any) -> tuple[Any, Array, Array]:
    """The solver's state after all epochs, which of its steps were taken, and the largest reason of those refused."""
    total = len(jax.tree.leaves(batch)[0])

    def one(state: Any, rows: Array | None) -> Any:
        some = batch if rows is None else jax.tree.map(lambda leaf: leaf[rows], batch)
        state, info = part.solver.step(state, some)
        return state, (info.moved, info.reason)

    if part.batches == 1:
        state, (moved, reasons) = jax.lax.scan(lambda state, _: one(state, None), state, length=part.epochs)
    else:
        keys = jax.random.split(key, part.epochs)
        rows = jax.vmap(lambda key: jax.random.permutation(key, total))(keys)
        rows = rows.reshape(part.epochs * part.batches, -1)
        state, (moved, reasons) = jax.lax.scan(one, state, rows)
    return state, moved, jnp.max(jnp.asarray(reasons, jnp.int32))


def _flat(tree: Any) -> Any:
    """Arrays (T, N, ...) as (T N, ...)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _flat_values(values: Any, total: int) -> Array:
    if jnp.shape(values) != (total,):
        raise ValueError(f"critic.forward: returned shape {jnp.shape(values)}; wanted a value a state, ({total},)")
    return values


def _standard(advantages: Array) -> Array:
    return (advantages - jnp.mean(advantages)) / (jnp.std(advantages) + float(np.finfo(np.float32).eps))


def _root(scale: Array) -> Array:
    """The root of the average square; 1 before there is one, and where all returns were zero."""
    square, weight = scale
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1) / jnp.where(weight > 0, weight, 1)), 1)


def _mean_at_end(values: Array, path: Trajectory) -> Array:
    ended = jnp.sum(path.ended)
    return jnp.where(ended > 0, jnp.sum(jnp.where(path.ended, values, 0)) / ended, jnp.nan)
