"""The most that any policy can earn, where an environment has few enough states to look at all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eki_jax import policy

PENDULUM = "Pendulum-v1"


class Grid(NamedTuple):
    """Where the values of states are kept, and what is tried.

    Attributes:
        angles: number of angles, all around.
        speeds: number of angular velocities.
        torques: number of actions.
        starts: number of starts of an episode over which the mean is taken.
        highest: the highest speed, as the environment has it.
    """

    angles: int = 481
    speeds: int = 481
    torques: int = 33
    starts: int = 100_000
    highest: float = 8.0


def pendulum(grid: Grid = Grid()) -> dict[str, float]:  # noqa: B008
    """The return of the best policy of Pendulum-v1, which may look at the clock, by dynamic programming.

    Backwards from the last step, ``V(s) = max_a r(s, a) + V(s')``, linear between the points of the grid.

    Returns:
        ``mean`` over the starts of an episode, and the ``deviation`` of one start from another.
    """
    environment = policy.from_gymnax(PENDULUM)
    assert environment.action_range is not None
    key = jax.random.key(0)
    angles, speeds = jnp.linspace(-jnp.pi, jnp.pi, grid.angles), jnp.linspace(-grid.highest, grid.highest, grid.speeds)
    states = jnp.stack(jnp.meshgrid(angles, speeds, indexing="ij"), axis=-1).reshape(-1, 2)
    torques = jnp.linspace(*environment.action_range, grid.torques)
    blank, _ = environment.reset(key)

    def interpolated(values: jax.Array, angle: jax.Array, speed: jax.Array) -> jax.Array:
        row = (angle + jnp.pi) / (2 * jnp.pi) * (grid.angles - 1)
        column = (speed / grid.highest + 1) / 2 * (grid.speeds - 1)
        return jax.scipy.ndimage.map_coordinates(values, [row, column], order=1, mode="nearest")

    def moved(state: jax.Array, torque: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        full = blank.replace(theta=state[0], theta_dot=state[1])
        after = environment.step(key, full, torque[None])
        cosine, sine, speed = after.final_observation
        return after.reward, jnp.arctan2(sine, cosine), speed

    def earlier(values: jax.Array, _: None) -> tuple[jax.Array, None]:
        def of(torque: jax.Array) -> jax.Array:
            reward, angle, speed = jax.vmap(moved, (0, None))(states, torque)
            return reward + interpolated(values, angle, speed)

        best = jax.lax.fori_loop(1, grid.torques, lambda i, best: jnp.maximum(best, of(torques[i])), of(torques[0]))
        return best.reshape(values.shape), None

    @jax.jit
    def found() -> dict[str, Any]:
        start = jnp.zeros((grid.angles, grid.speeds))
        values, _ = jax.lax.scan(earlier, start, length=environment.most_steps)
        _, seen = jax.vmap(environment.reset)(jax.random.split(key, grid.starts))
        returns = interpolated(values, jnp.arctan2(seen[:, 1], seen[:, 0]), seen[:, 2])
        return {"mean": jnp.mean(returns), "deviation": jnp.std(returns)}

    return {name: float(value) for name, value in found().items()}


# The grids, by the environments for which it is computed.
GRIDS = {PENDULUM: Grid()}
