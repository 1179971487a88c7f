"""Test accuracy for a given number of forward passes."""

from __future__ import annotations

from benchmarks.forward_budget.cli import main as main
