"""Intervals that mean what they say: coverage by exact sums, and by whole studies."""

import math
from itertools import product
from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from gradflow import (
    classify,
    Decided,
    fraction,
    GradientFlow,
    Integrator,
    KIND,
    LowRankInit,
    Moments,
    names_of,
    Narrower,
    paired,
    RESULTS,
    run_study,
    run_until,
    Solution,
    Store,
    strata,
    Study,
)
from gradflow.manifolds import FixedRank
from gradflow.models import SquaredLoss
from gradflow.statistics import (
    clopper_pearson,
    confidence_sequence,
    counted,
    zero_limit,
)
from gradflow.theory import LowRankTheory


# The probabilities at which coverage is asked for.
CHANCES = (0.0, 1e-3, 0.05, 0.5)


def _least(studies, level=0.95):
    """Of so many studies, how many cover: fewer have a chance of 0.1 %."""
    return stats.binom.ppf(1e-3, studies, level)


# ---- confidence sequences


@pytest.mark.parametrize("count, draws", [(0, 1), (0, 50), (3, 20), (20, 20), (7, 999)])
def test_a_confidence_sequence_is_where_the_martingale_is_small(count, draws):
    low, high = confidence_sequence(count, draws)
    assert 0 <= low <= count / draws <= high <= 1

    def ratio(p):
        # The mean likelihood under Beta(1/2, 1/2), by quadrature, over that of p.
        angle = (np.arange(20_000) + 0.5) / 20_000 * np.pi / 2
        q = np.sin(angle) ** 2
        mean = np.mean(stats.binom.pmf(count, draws, q))
        return mean / stats.binom.pmf(count, draws, p)

    for end in (low, high):
        if 0 < end < 1:
            assert ratio(end) == pytest.approx(20, rel=1e-6)


def test_a_confidence_sequence_grows_with_the_count_and_narrows():
    lows, highs = np.array([confidence_sequence(k, 60) for k in range(61)]).T
    assert np.all(np.diff(lows) > 0) and np.all(np.diff(highs[:-1]) > 0)
    widths = [np.diff(confidence_sequence(n // 4, n))[0] for n in (8, 40, 400, 4000)]
    assert np.all(np.diff(widths) < 0)
    # Wider than for a number of draws chosen beforehand, by a factor of
    # sqrt(log(n) + 2 log(20) + log(pi / 2)) / 1.96 at most.
    fixed = np.diff(clopper_pearson(1000, 4000))[0]
    assert fixed < widths[-1] < math.sqrt(math.log(4000) + 6.45) / 1.96 * fixed * 1.01


def _walk(p, draws, ends):
    """The exact chance that a run of draws is ended as `ends[n][s]` says: the chance of
    each (n, s) at which it is."""
    alive, ended = np.array([1.0]), {}
    for n in range(1, draws + 1):
        alive = np.append(alive * (1 - p), 0) + np.insert(alive * p, 0, 0)
        stop = ends[n]
        for s in np.flatnonzero(stop & (alive > 0)):
            ended[n, int(s)] = float(alive[s])
        alive = np.where(stop, 0.0, alive)
    return ended, alive


@pytest.fixture(scope="module")
def sequences():
    """The intervals of all counts, up to 100 draws."""
    return {n: [counted(s, n, sequential=True) for s in range(n + 1)] for n in LENGTHS}


LENGTHS = range(1, 101)


def _covers(shares, p):
    return np.array([share.low <= p <= share.high for share in shares])


@pytest.mark.parametrize("p", [*CHANCES, 0.01, 0.2, 0.7, 0.9999])
def test_all_intervals_cover_at_once(sequences, p):
    """The chance that the true p is ever outside, by exact sums."""
    outside = {n: ~_covers(shares, p) for n, shares in sequences.items()}
    ended, _ = _walk(p, LENGTHS[-1], outside)
    assert sum(ended.values()) <= 0.05


@pytest.mark.parametrize("rule", [Narrower(0.3), Decided(0.1), Decided(0.5)], ids=str)
@pytest.mark.parametrize("every", [1, 25])
def test_coverage_at_the_stop(sequences, rule, every):
    """Whatever the rule and however often one looks, by exact sums."""
    last = LENGTHS[-1]
    ends = {n: np.full(n + 1, n == last) for n in LENGTHS}
    for n in range(every, last, every):
        ends[n] = np.array([rule(share) for share in sequences[n]])
    for p in (*CHANCES, 0.02, 0.3):
        ended, _ = _walk(p, last, ends)
        assert sum(ended.values()) == pytest.approx(1)
        inside = {n: _covers(shares, p) for n, shares in sequences.items()}
        covered = sum(chance for (n, s), chance in ended.items() if inside[n][s])
        assert covered >= 0.95 - 1e-12


def test_looking_often_at_fixed_intervals_does_not_cover():
    """What the sequence is for: stopping when an interval first leaves out 1/2."""
    outside = {
        n: ~_covers([counted(s, n) for s in range(n + 1)], 0.5) for n in range(1, 101)
    }
    ended, _ = _walk(0.5, 100, outside)
    assert sum(ended.values()) > 0.12


# ---- whole studies


def _coin(point):
    zero = jnp.zeros_like(point)
    result: Any = RESULTS.rule_met
    stats = {"steps": jnp.asarray(0), "rejected": jnp.asarray(0)}
    return Solution(point, zero, zero, zero, zero, None, None, result, stats)


def _below(p, solution):
    return solution.point < p


def _itself(found):
    return found


def _study(p, draws):
    return Study(jr.uniform, _coin, eqx.Partial(_below, jnp.asarray(p)), draws, 512)


@pytest.mark.parametrize("p", CHANCES)
@pytest.mark.parametrize(
    "studies", [40, pytest.param(400, marks=pytest.mark.slow)], ids=str
)
def test_studies_cover(p, studies):
    """Fixed and sequential, end to end."""
    fixed = ended = 0
    for seed in range(studies):
        share = fraction(run_study(_study(p, 100), jr.key(seed)).finding)
        fixed += share.low <= p <= share.high
        study, rule = _study(p, 512), Narrower(0.1)
        outcome, share = run_until(study, jr.key(seed), _itself, rule, every=64)
        assert share.draws == outcome.finding.size and share.sequential
        assert share.outer_high - share.outer_low <= 0.1 or share.draws == 512
        ended += share.low <= p <= share.high
    print(
        f"p = {p:g}: {fixed} of {studies} studies of fixed size cover it, {ended} of "
        f"{studies} sequential ones"
    )
    assert min(fixed, ended) >= _least(studies)


@pytest.mark.slow
def test_a_chance_of_one_half_is_covered():
    """Balanced flow of one number with a sign-symmetric start: the sign is kept, and
    decides. All draws are of one run, dealt out to studies."""
    studies, size = 400, 100
    one = jnp.ones((1, 1))
    energy = SquaredLoss(Moments(one, one, one, 1, autoencoding=True))
    theory = LowRankTheory(energy, 1, 2)
    flow = GradientFlow(energy, FixedRank(1, 2))
    study = Study(
        LowRankInit((1, 1), 1, jnp.asarray(1.0)),
        Integrator(cast(Any, flow), stop=theory.decided),
        eqx.Partial(classify, flow, theory),
        draws=studies * size,
        batch=1000,
    )
    kinds = names_of(KIND, run_study(study, jr.key(0)).finding.kind)
    assert set(kinds) == {"global_minimum", "strict_saddle"}
    flags = (kinds == "global_minimum").reshape(studies, size)
    fixed = [fraction(row) for row in flags]
    covered = sum(share.low <= 0.5 <= share.high for share in fixed)
    assert covered >= _least(studies)
    ended = 0
    for row in flags:
        looks = (fraction(row[:n], sequential=True) for n in range(10, size + 1, 10))
        share = next(share for share in looks if Narrower(0.4)(share))
        ended += share.low <= 0.5 <= share.high
    print(f"exactly 1/2: {covered} of {studies} studies of fixed size, {ended} others")
    assert ended >= _least(studies)


def test_stopping_is_resumed(tmp_path):
    rule, key = Narrower(0.08), jr.key(1)
    plain, share = run_until(_study(0.05, 2000), key, _itself, rule, every=64)
    assert 64 < share.draws < 2000
    for _ in range(2):
        with Store(tmp_path / "a", chunk=64) as store:
            kept, again = run_until(_study(0.05, 2000), key, _itself, rule, store=store)
        assert again == share
        np.testing.assert_array_equal(kept.finding, plain.finding)
    assert len(list(tmp_path.rglob("chunk-*"))) == share.draws / 64
    # A finer answer goes on from there.
    with Store(tmp_path / "a") as store:
        finer_rule = Narrower(0.06)
        _, finer = run_until(_study(0.05, 2000), key, _itself, finer_rule, store=store)
    assert finer.draws > share.draws
    with Store(tmp_path / "b", shard=(1, 2)) as store:
        with pytest.raises(ValueError, match="shard 1 of 2: when to stop"):
            run_until(_study(0.05, 9), key, _itself, rule, store=store)


def test_undecided_draws_count_both_ways_when_stopping():
    flag = lambda found: (found, ~found)
    rule = Decided(0.3)
    _, share = run_until(_study(0.05, 256), jr.key(1), flag, rule, every=64)
    # All others are open: nothing is ever decided.
    assert share.draws == 256 and share.count + share.undecided == 256
    assert share.outer_high == 1.0 and share.outer_low == share.low


@pytest.mark.parametrize(
    "flag, piece",
    [
        (lambda found: found[:3], "one truth value per draw"),
        (lambda found: found * 1.0, "one truth value per draw"),
        (lambda found: (found | True, found | True), "flagged and as undecided"),
    ],
)
def test_flags_that_are_none(flag, piece):
    with pytest.raises(ValueError, match=piece):
        run_until(_study(0.5, 8), jr.key(0), flag, Decided(0.5))


@pytest.mark.parametrize("rule", [Narrower, Decided])
@pytest.mark.parametrize("number", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_rules_out_of_range(rule, number):
    with pytest.raises(ValueError, match="must be a number between 0 and 1"):
        rule(number)


# ---- in words


@pytest.mark.parametrize("draws", [1, 20, 256, 10**6])
def test_the_limit_at_none(draws):
    limit = zero_limit(draws)
    assert (1 - limit) ** draws == pytest.approx(0.05)
    assert limit <= 3 / draws
    share = counted(0, draws)
    assert share.in_words("a saddle") == (
        f"none of {draws} draws: a saddle has probability <= {limit:.4g} with 95 % "
        "confidence"
    )


def test_words():
    assert (
        counted(20, 20)
        .in_words("a minimum")
        .startswith("each of 20 draws: a minimum has probability >= 0.8609")
    )
    share = counted(5, 100, 3)
    assert share.in_words("a saddle") == (
        f"5 of 100 draws: a saddle has probability {share.low:.4g} to "
        f"{share.outer_high:.4g} with 95 % confidence, whatever the 3 undecided draws "
        "are"
    )
    none = counted(0, 100, 2).in_words("a saddle")
    assert "0 of 100 draws: a saddle has probability 0 to 0.07" in none
    limit = confidence_sequence(0, 100)[1]
    said = counted(0, 100, sequential=True).in_words("a saddle")
    assert f"<= {limit:.4g}" in said


# ---- two settings on the same draws


def _pairs(both, first, second, neither):
    one = [True] * (both + first) + [False] * (second + neither)
    other = [True] * both + [False] * first + [True] * second + [False] * neither
    return np.array(one), np.array(other)


@pytest.mark.parametrize(
    "counts", [(5, 1, 9, 5), (0, 0, 6, 0), (3, 4, 4, 1), (7, 0, 0, 2), (1, 12, 2, 9)]
)
def test_mcnemar(counts):
    both, first, second, neither = counts
    found = paired(*_pairs(*counts))
    seen = (found.both, found.only_first, found.only_second, found.neither)
    assert seen == counts and found.undecided == 0
    # Both tails of a fair coin, by counting.
    n, k = first + second, min(first, second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert found.outer_p_value == found.p_value
    difference = (first - second) / sum(counts)
    assert found.low <= difference <= found.high
    swapped = paired(*reversed(_pairs(*counts)))
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_undecided_pairs_by_trying_all_answers():
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, other = rng.random((2, 12)) < 0.4
        one[:3], other[:3] = True, False
        open_one, open_other = rng.random((2, 12)) < 0.15
        one, other = one & ~open_one, other & ~open_other
        found = paired(one, other, open_one, open_other)
        largest, low, high = 0.0, 1.0, -1.0
        places = [*np.argwhere(open_one), *(12 + np.argwhere(open_other))]
        for answers in product([False, True], repeat=len(places)):
            flags = np.concatenate([one, other])
            for (place,), answer in zip(places, answers, strict=True):
                flags[place] = answer
            each = paired(flags[:12], flags[12:])
            largest = max(largest, each.p_value)
            low, high = min(low, each.low), max(high, each.high)
        assert found.outer_p_value == pytest.approx(largest)
        assert found.low <= low and high <= found.high
        assert found.undecided == int((open_one | open_other).sum())
        if found.undecided:
            assert "undecided" in str(found)


@pytest.mark.parametrize("first, second", [(0.0, 0.0), (0.3, 0.3), (0.02, 0.3)])
def test_coverage_of_a_difference(first, second):
    """By exact sums over the multinomial counts of 15 draws."""
    draws, covered = 15, 0.0
    for a in range(draws + 1):
        for b in range(draws + 1 - a):
            chance = stats.multinomial.pmf(
                [a, b, draws - a - b], draws, [first, second, 1 - first - second]
            )
            found = paired(*_pairs(0, a, b, draws - a - b))
            covered += chance * (found.low <= first - second <= found.high)
    assert covered >= 0.95


def test_pairs_of_different_draws():
    with pytest.raises(ValueError, match="first has 2 draws and second 1"):
        paired([True, False], [True])
    with pytest.raises(ValueError, match="both in second and undecided"):
        paired([True], [True], None, [True])


# ---- strata


def test_strata():
    ranks = np.array([2, 1, 2, 2, 1])
    flags = np.array([True, True, False, True, True])
    undecided = np.array([False, False, True, False, False])
    found = strata(ranks, flags, undecided)
    assert list(found) == [1, 2]
    assert str(found[1]) == str(fraction([True, True]))
    assert str(found[2]) == str(fraction([True, False, True], [False, True, False]))
    assert sum(share.draws for share in found.values()) == 5
    assert list(strata(["b", "a"], [True, False])) == ["a", "b"]
    with pytest.raises(ValueError, match="labels has 1 entries for 2 draws"):
        strata([1], [True, False])


def test_limits_that_are_not_1_do_not_look_like_it():
    share = fraction(np.ones(1_000_000, bool))
    assert str(share).endswith("95 % interval [0.9999963, 1.0000000]")
    assert ">= 0.999997 with" in share.in_words("a minimum")
