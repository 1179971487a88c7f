"""What is compared: environments, budgets, and every method's settings, in three sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

NAMES = {
    "natural": "natural policy gradient",
    "natural-sign": "natural policy gradient, sign units",
    "natural-int8": "natural policy gradient, 8-bit weights",
    "natural-rules": "natural policy gradient, a list of eight rules",
    "per-sample": "clipped policy gradient, per sample",
    "natural-episodes": "natural, episodes as a black box",
    "eki": "EKI, episodes as a black box",
    "open-es": "OpenES",
    "pgpe": "PGPE",
    "ppo": "PPO (differentiates the policy)",
}
RIVALS = ("open-es", "pgpe")
# Policies without derivatives, of the natural policy gradient, and the environment on which they are compared.
DISCRETE = {"natural-sign": "sign", "natural-int8": "int8", "natural-rules": "rules"}
OF_DISCRETE = "CartPole-v1"


class Task(NamedTuple):
    """An environment as it is compared.

    Attributes:
        title: its name in a table.
        goal: sum of rewards of an episode that methods of whole episodes aim at: the most there is.
        span: how much the returns of policies differ, about.
        budget: environment steps of preset cpu.
        discount: factor of a reward one step later, for methods that see rewards step by step.
        widths: hidden units of policy and critic.
        units: their kind, of :func:`benchmarks.policy.networks.build`.
    """

    title: str
    goal: float
    span: float
    budget: int
    discount: float = 0.99
    widths: tuple[int, ...] = (64, 64)
    units: str = "tanh"


TASKS = {
    "CartPole-v1": Task("CartPole", 500.0, 500.0, 200_000),
    "Acrobot-v1": Task("Acrobot", 0.0, 500.0, 1_000_000),
    "Pendulum-v1": Task("Pendulum", 0.0, 1500.0, 1_000_000, discount=0.98),
    "MountainCarContinuous-v0": Task("MountainCar, continuous", 100.0, 100.0, 400_000),
    "Breakout-MinAtar": Task("MinAtar Breakout", 50.0, 50.0, 2_000_000, units="relu"),
    "Asterix-MinAtar": Task("MinAtar Asterix", 50.0, 50.0, 2_000_000, units="relu"),
}


class Preset(NamedTuple):
    """A size of the comparison.

    Attributes:
        share: factor of every environment's budget.
        environments: names of the environments.
        seeds: seeds of the runs; tuning has a seed of its own.
        points: number of measurements in a run.
        episodes: number of episodes of a measurement.
    """

    share: float
    environments: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    points: int = 20
    episodes: int = 64


PRESETS = {
    "smoke": Preset(0.05, ("CartPole-v1",), (0, 1), 2, 8),
    "cpu": Preset(1.0),
    "full": Preset(10.0),
}
# The seed of tuning runs, which no reported run has, and what they may spend of the budget.
TUNING_SEED, TUNING_SHARE = 100, 0.5

# The setting of each method that is chosen from a grid, by the mean of the last three measurements of a tuning run.
GRIDS: dict[str, tuple[str, tuple[float, ...]]] = {
    "natural": ("divergence", (0.01, 0.03)),
    "natural-sign": ("divergence", (0.01, 0.03)),
    "natural-int8": ("divergence", (0.01, 0.03)),
    "natural-rules": ("sigma", (0.3, 1.0, 3.0)),
    "per-sample": ("learning_rate", (3e-4, 1e-3, 3e-3)),
    "natural-episodes": ("sigma", (0.1, 0.3)),
    "eki": ("sigma", (0.3, 1.0)),
    "open-es": ("learning_rate", (0.01, 0.03, 0.1)),
    "pgpe": ("learning_rate", (0.03, 0.1, 0.3)),
    "ppo": ("learning_rate", (3e-4, 1e-3, 3e-3)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "natural": {"particles": 200, "copies": 16, "steps": 128},
    "natural-sign": {"particles": 200, "copies": 16, "steps": 128},
    "natural-int8": {"particles": 200, "copies": 16, "steps": 128},
    "natural-rules": {"particles": 200, "copies": 16, "steps": 128, "divergence": 0.01},
    "per-sample": {"particles": 8, "copies": 16, "steps": 128},
    "natural-episodes": {"particles": 64, "episodes": 2, "parts": 10},
    "eki": {"particles": 64, "episodes": 2, "parts": 10},
    "open-es": {"particles": 64, "episodes": 2, "sigma": 0.1},
    "pgpe": {"particles": 64, "episodes": 2, "sigma": 0.1},
    "ppo": {"copies": 16, "steps": 128},
}


# MinAtar's games begin in few ways, and PPO stops at the first policy that pays, but for many copies and large rates:
# other settings and another grid, for the other clipped policy gradient too.
OF_GAMES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = dict.fromkeys(
    ("per-sample", "ppo"), ({"copies": 256, "steps": 32}, (1e-3, 3e-3, 1e-2))
)


def grid(environment: str, method: str) -> tuple[str, tuple[float, ...]]:
    """The setting of a method that is chosen on an environment, and the values it is chosen from."""
    name, values = GRIDS[method]
    return name, OF_GAMES[method][1] if _is_game(environment) and method in OF_GAMES else values


def _is_game(environment: str) -> bool:
    return environment.endswith("MinAtar")


def methods_for(environment: str) -> tuple[str, ...]:
    """The methods that are compared on an environment."""
    return tuple(name for name in NAMES if name not in DISCRETE or environment == OF_DISCRETE)


def task(preset: Preset, environment: str, method: str, value: float, seeds: tuple[int, ...]) -> dict[str, Any]:
    """What one process runs: an environment, a method with its setting from the grid, and seeds one after another."""
    of = TASKS[environment]
    budget = of.budget * preset.share
    if seeds == (TUNING_SEED,):
        budget *= TUNING_SHARE
    return {
        "environment": environment,
        "method": method,
        **({} if of.units == "tanh" else {"units": of.units}),
        **SETTINGS[method],
        **(OF_GAMES[method][0] if _is_game(environment) and method in OF_GAMES else {}),
        GRIDS[method][0]: value,
        "seeds": list(seeds),
        "budget": int(budget),
        "points": preset.points,
        "test_episodes": preset.episodes,
    }
