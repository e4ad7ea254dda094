"""Studies that are none are told so, in words."""

import itertools
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from gradflow import (
    check_inspection,
    check_study,
    classify,
    GaussianInit,
    GradientFlow,
    Integrator,
    KIND,
    RESULTS,
    Solution,
    Study,
)
from gradflow.datasets import gaussian
from gradflow.models import SquaredLoss
from gradflow.store.arrays import is_member
from gradflow.theory import LinearTheory


KEY = jr.key(3)


def _start(key):
    return jr.normal(key, (3,))


def _shrink(point, result: Any = RESULTS.successful):
    """Ten steps of gradient descent on |x|^2 / 2."""
    end = jax.lax.fori_loop(0, 10, lambda _, x: 0.5 * x, point)
    return Solution(
        point=end,
        energy=jnp.sum(end**2) / 2,
        speed=jnp.linalg.norm(end),
        time=jnp.full((), 10.0),
        distance=jnp.linalg.norm(end - point),
        times=None,
        history=None,
        result=result,
        stats={"steps": jnp.full((), 10), "rejected": jnp.full((), 0)},
    )


def _look(solution):
    open_end: Any = KIND.unresolved
    return {
        "low": solution.energy < 1e-6,
        "signs": jnp.sign(solution.point).astype(int),
        "ratio": solution.energy / 0,
        "kind": open_end,
    }


def _failing(certificate):
    assert not certificate.sound
    with pytest.raises(ValueError) as error:
        certificate.require()
    text = str(error.value)
    assert "\n" not in text and text in str(certificate)
    return next(c.identity for c in certificate.checks if not c.holds), text


def test_a_study_of_ones_own_is_sound():
    assert check_inspection(_look, _shrink, _start, KEY).sound
    certificate = check_study(Study(_start, _shrink, _look, draws=7), KEY)
    assert certificate.sound, str(certificate)
    assert "Study: draw i depends on the key and i only: yes" in str(certificate)
    assert "Study: inspect (_look), one solution has one finding: yes" in str(
        certificate
    )


@pytest.mark.slow
def test_a_network_is_sound():
    theory = LinearTheory(SquaredLoss(gaussian(jr.key(7), 4, 20)), 2)
    flow = GradientFlow(theory.energy)
    for method in (diffrax.Tsit5(), "auto"):
        study = Study(
            GaussianInit((4, 2, 4), 0.3),
            Integrator(flow, method=method, stop=theory.certificate),
            eqx.Partial(classify, flow, theory),
            draws=100,
        )
        certificate = check_study(study, KEY)
        assert certificate.sound, str(certificate)


COUNT = itertools.count()


def _picking(solution):
    return solution.point[solution.point > 0]


def _branching(solution):
    return {"good": 1.0} if solution.energy < 1e-9 else {"bad": 1.0}


def _if(solution):
    return jnp.sum(solution.point) if solution.energy > 0 else solution.energy


def _complex(solution):
    return jax.lax.complex(solution.energy, solution.energy)


@pytest.mark.parametrize(
    "inspect, identity, words",
    [
        (lambda s: "low", "a finding is numbers", "it raised TypeError: it has a str"),
        (lambda s: None, "a finding is numbers and truth values", "it has no arrays"),
        (_complex, "a finding is numbers and truth values", "an array of complex128"),
        (_picking, "each finding has the same shapes", "finding is of shape ("),
        (lambda s: {f"n{next(COUNT)}": s.energy}, "each finding", "only some runs"),
        (lambda s: s.energy + next(COUNT), "one solution has one", "remember earlier"),
        (_if, "a batch has the findings of its solutions", "it raised Tracer"),
    ],
)
def test_inspections_that_are_none(inspect, identity, words):
    found, text = _failing(check_inspection(inspect, _shrink, _start, KEY))
    assert found.startswith(identity) and words in text


def _other_result(point):
    solution = _shrink(point)
    result: Any = diffrax.RESULTS.successful
    return eqx.tree_at(lambda s: s.result, solution, result, is_leaf=is_member)


def _two_names(solution):
    """The path a.b twice."""
    return {"a.b": solution.energy, "a": {"b": solution.speed}}


@jax.custom_batching.custom_vmap
def _normalized(point):
    return point


@_normalized.def_vmap
def _in_a_batch(size, batched, point):
    """As what is normalized by its batch: here in large ones only."""
    return (0.5 if size > 3 else 1.0) * point, batched[0]


@pytest.mark.parametrize(
    "parts, identity, words",
    [
        ((_start, _shrink, lambda s: s.nothing), "its parts fit", "inspect raised Att"),
        ((_start, _shrink, _if), "its parts fit", "inspect raised Tracer"),
        ((_start, _shrink, _complex), "its parts fit", "an array of complex128"),
        ((_start, _shrink, lambda s: None), "its parts fit", "inspect gives no arrays"),
        ((_start, lambda p: p, _look), "its parts fit", "descend gives "),
        ((_start, lambda p: p @ jnp.ones(4), _look), "its parts", "descend raised Typ"),
        ((_start, _other_result, _look), "its parts fit", "a member of gradflow.RES"),
        ((lambda key: None, _shrink, _look), "its parts fit", "initialize gives no ar"),
        ((lambda key: "a", _shrink, _look), "its parts fit", "initialize raised Type"),
        (
            (lambda key: jnp.ones(3), _shrink, _look),
            "initialize (<lambda>), another",
            "",
        ),
        (
            (_start, _shrink, lambda s: s.energy + next(COUNT)),
            "inspect (<lambda>), one solution has one finding",
            "it must not draw random numbers",
        ),
        (
            (_start, lambda point: _shrink(_normalized(point)), _look),
            "draw i depends on the key and i only",
            "on the batch",
        ),
        ((_start, _shrink, _two_names), "its parts fit", "both named a.b"),
    ],
)
def test_studies_that_are_none(parts, identity, words):
    found, text = _failing(check_study(Study(*parts, draws=7), KEY))
    assert found.startswith(identity), text
    assert words in text and text.startswith("Study: ")
