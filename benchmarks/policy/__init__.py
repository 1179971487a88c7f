"""Policies: the natural policy gradient and episodes as a black box beside evolution strategies and PPO."""
