"""Malformed input to every public callable: an error that names it, a refusal that says why, or the right result.

A case is a call with one argument replaced, or two. What comes back is one of ``KINDS``; only the first three are as
they should be, and of the obscure errors from inside at most one in a hundred is let pass. Results that are accepted
are compared with those of the same call in float64, and where the definition is short with NumPy's own.

``python -m pytest tests/fuzz -m slow -s`` runs the fixed set of cases and prints the table; with ``-k "of[euler]"`` it
runs those of one call.
"""

from __future__ import annotations

import collections
import importlib
import inspect
import random
import sys
from typing import Any, get_origin

import pytest
from fuzz.calls import MADE
from fuzz.changes import REFUSED
from fuzz.exempt import EXEMPT
from fuzz.judging import CALLS, KINDS, Case, cases_of, classified, pairs_of, table, unexpected
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from docs import test_reference

PAIRS = 4  # cases of a call with two arguments replaced
#: Calls that compile much, for the slow set alone beyond one case of each.
COSTLY = ("training.fit", "natural.natural_gradient", "natural.value_and_natural_direction")
COSTLY += ("kalman.etki, prior", "kalman.uki", "kalman.aldi", "kalman.sparse", "calibrate.process_pool")
COSTLY += ("calibrate.Calibration, l", "calibrate.Calibration, inflated")


def named(path: str) -> Any:
    """The public callable that a call's name begins with."""
    module, _, name = f"eki_jax.{path.partition(',')[0]}".rpartition(".")
    return getattr(importlib.import_module(module), name)


def public_callables() -> dict[int, str]:
    """The paths of all public functions and classes, one for each."""
    found: dict[int, str] = {}
    for module in test_reference.public_modules():
        loaded = importlib.import_module(module)
        for name in test_reference.public_names(loaded):
            thing = getattr(loaded, name)
            path = f"{module}.{name}".removeprefix("eki_jax.")
            if callable(thing) and get_origin(thing) is None:
                found.setdefault(id(thing), path)
    return found


def test_every_public_callable_has_a_call() -> None:
    """Or stands in the list of exemptions, and not in both."""
    called = {id(named(name)) for name in CALLS}
    exempt = {id(named(name)) for reason in EXEMPT for name in reason.names}
    missing = [path for key, path in public_callables().items() if key not in called | exempt]
    assert not missing, "these want a call in tests/fuzz/calls.py or extras.py, or a reason in exempt.py"
    assert not called & exempt


@pytest.mark.parametrize("reason", EXEMPT, ids=lambda reason: reason.words[:30])
def test_reasons_hold(reason: Any) -> None:
    assert [name for name in reason.names if not reason.holds(named(name))] == []


def one_of_each() -> list[Case]:
    """One case of every call that is to be refused, drawn once and for all."""
    draw = random.Random(0)
    return [draw.choice([case for case in cases_of(name) if case.change.wanted == REFUSED]) for name in CALLS]


def check(case: Case) -> None:
    kind, words = classified(case)
    assert not unexpected(case, kind), f"{case}: {kind}: {words}"


def test_one_malformed_call_of_each() -> None:
    for case in one_of_each():
        check(case)


@seed(0)
@settings(
    max_examples=40, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    st.sampled_from([name for name in CALLS if not name.startswith(COSTLY)]).flatmap(
        lambda name: st.sampled_from(list(cases_of(name)))
    )
)
def test_a_sample_of_malformed_calls(case: Case) -> None:
    check(case)


@pytest.fixture(scope="module")
def results() -> dict[str, collections.Counter[str]]:
    return collections.defaultdict(collections.Counter)


@pytest.mark.slow
@pytest.mark.parametrize("of", CALLS)
def test_all_cases(of: str, results: dict[str, collections.Counter[str]]) -> None:
    """Every argument replaced by everything of its role, and pairs of them; the last test counts obscure errors."""
    bad = []
    for case in [*cases_of(of), *pairs_of(of, PAIRS)]:
        kind, words = classified(case)
        results[of][kind] += 1
        if unexpected(case, kind):
            bad.append((kind, f"{kind}: {case}: {words}"))
    print(f"\n{of}: {dict(results[of])}", *(text for _, text in bad), sep="\n")
    assert [text for kind, text in bad if kind != "obscure error"] == []


@pytest.mark.slow
def test_the_fixed_set(results: dict[str, collections.Counter[str]]) -> None:
    """At least 4,000 cases: none wrong, none poisoned, and at most one obscure error in a hundred."""
    if len(results) < len(CALLS):
        pytest.skip("counts what the tests before it found; not all of them ran")
    number = sum(counts.total() for counts in results.values())
    print(f"\n{number} cases of {len(results)} calls\n{table(results)}")
    total = sum(results.values(), collections.Counter[str]())
    assert number >= 4000
    assert [kind for kind in KINDS[3:7] if total[kind]] == []
    assert total["obscure error"] <= number / 100


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CALLS if inspect.isfunction(named(name))])
def test_calls_reach_what_they_are_named_for(name: str) -> None:
    """The code of the public function runs, and not another's with a similar name."""
    code, reached = named(name).__code__, []
    MADE.clear()  # what another case made would be used again

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code is code:
            reached.append(name)

    sys.setprofile(watch)
    try:
        CALLS[name].call(**{argument: valid for argument, (_, valid) in CALLS[name].valid.items()})
    finally:
        sys.setprofile(None)
    assert reached
