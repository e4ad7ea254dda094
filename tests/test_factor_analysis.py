"""The front for practitioners, beside scikit-learn's."""

import warnings
from typing import Any, cast

import numpy as np
import pytest

from gradflow import FactorAnalysis
from gradflow.factor_analysis import ConvergenceWarning, HeywoodWarning, rotate


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(2, 7)) * 1.5
    noise = rng.normal(size=(400, 7)) * rng.uniform(0.5, 1, 7)
    return rng.normal(size=(400, 2)) @ mixing + noise + 3.0


def _aligned(ours, theirs):
    signs = np.sign(np.sum(ours * theirs, axis=1, keepdims=True))
    return signs * ours


@pytest.mark.parametrize("rotation", [None, "varimax", "quartimax"])
def test_one_line_changes(data, rotation):
    decomposition = pytest.importorskip("sklearn.decomposition")
    theirs = decomposition.FactorAnalysis(
        2, rotation=rotation, tol=1e-12, max_iter=10_000, svd_method="lapack"
    ).fit(data)
    ours = FactorAnalysis(2, rotation=rotation).fit(data)
    close = lambda a, b, atol=1e-5: np.testing.assert_allclose(a, b, atol=atol)
    close(ours.get_covariance(), theirs.get_covariance())
    close(ours.get_precision(), theirs.get_precision())
    close(ours.noise_variance_, theirs.noise_variance_)
    close(ours.mean_, theirs.mean_)
    # Their rotation stops at a relative gain of 1e-6.
    atol = 1e-5 if rotation is None else 1e-2
    close(_aligned(ours.components_, theirs.components_), theirs.components_, atol)
    close(ours.score(data), theirs.score(data), 1e-9)
    close(ours.score_samples(data), theirs.score_samples(data))
    found, known = ours.transform(data[:9]), theirs.transform(data[:9])
    close(_aligned(found.T, known.T).T, known, atol)
    assert ours.n_features_in_ == 7 and ours.n_iter_ < theirs.n_iter_
    close(ours.fit_transform(data[:, ::-1])[0], ours.transform(data[:1, ::-1])[0])


def test_isotropic_is_probabilistic_pca(data):
    decomposition = pytest.importorskip("sklearn.decomposition")
    theirs = decomposition.PCA(2).fit(data)
    ours = FactorAnalysis(2, noise="isotropic").fit(data)
    # They divide the covariance by n - 1.
    unbiased = ours.get_covariance() * 400 / 399
    np.testing.assert_allclose(unbiased, theirs.get_covariance(), atol=1e-10)
    assert ours.n_iter_ == 0 and ours.solution_ is None
    diagonal = FactorAnalysis(2).fit(data)
    assert diagonal.score(data) > ours.score(data)


@pytest.mark.slow
def test_scores_samples_and_criteria(data):
    model = FactorAnalysis(2).fit(data)
    np.testing.assert_allclose(model.loglike_, 400 * model.score(data), rtol=1e-12)
    covariance = model.get_covariance()
    np.testing.assert_allclose(
        covariance @ model.get_precision(), np.eye(7), atol=1e-11
    )
    white = model.components_ / np.sqrt(model.noise_variance_)
    gram = white @ white.T
    assert abs(gram[0, 1]) < 1e-10 * gram[0, 0] and gram[0, 0] > gram[1, 1]
    draws = model.sample(50_000, seed=1)
    assert draws.shape == (50_000, 7)
    np.testing.assert_allclose(draws.mean(axis=0), model.mean_, atol=0.1)
    assert np.abs(np.cov(draws.T) - covariance).max() < 0.03 * np.abs(covariance).max()
    np.testing.assert_array_equal(draws[:5], model.sample(50_000, seed=1)[:5])
    # The data have two factors.
    scores = [FactorAnalysis(k).fit(data).bic() for k in (1, 2, 3)]
    assert np.argmin(scores) == 1


def test_integers_and_lists(data):
    whole = np.round(10 * data).astype(int)
    model = FactorAnalysis(1).fit(whole.tolist())
    np.testing.assert_allclose(model.mean_, whole.mean(axis=0))


def test_starts(data):
    model = FactorAnalysis(2, noise_variance_init=np.full(7, 0.3)).fit(data)
    other = FactorAnalysis(2).fit(data)
    np.testing.assert_allclose(model.loglike_, other.loglike_, rtol=1e-10)


def test_params(data):
    model = FactorAnalysis(3, rotation="varimax")
    same = FactorAnalysis(**model.get_params())
    assert same.get_params() == model.get_params()
    assert model.set_params(n_components=1).n_components == 1
    with pytest.raises(ValueError, match="svd_method is no argument: n_components, "):
        model.set_params(svd_method="lapack")


@pytest.mark.parametrize("method", ["varimax", "quartimax"])
def test_rotations_are_orthogonal_and_best(method):
    rng = np.random.default_rng(2)
    loadings = rng.normal(size=(8, 2))
    turned = rotate(loadings, method)
    np.testing.assert_allclose(turned @ turned.T, loadings @ loadings.T, atol=1e-12)

    def criterion(w):
        spread = np.sum(np.sum(w**2, axis=0) ** 2) / 8 if method == "varimax" else 0
        return np.sum(w**4) - spread

    angles = np.linspace(0, np.pi, 721)
    best = max(
        criterion(loadings @ [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        for a in angles
    )
    assert best - 1e-9 <= criterion(turned) < best * (1 + 1e-4)


def test_heywood_cases_warn():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(12, 4))
    x[:, 1] = x[:, 0]  # a variable twice
    with pytest.warns(HeywoodWarning, match=r"noise variance of x\[0\], x\[1\] reach"):
        model = FactorAnalysis(1).fit(x)
    np.testing.assert_array_equal(model.heywood_, [True, True, False, False])
    np.testing.assert_allclose(
        model.noise_variance_[:2], 1e-6 * x[:, :2].var(axis=0), rtol=1e-6
    )


def test_more_variables_than_samples():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(15, 1)) @ rng.normal(size=(1, 40)) + rng.normal(size=(15, 40))
    model = FactorAnalysis(1).fit(x)
    assert np.isfinite(model.score(x)) and not model.heywood_.any()


def test_steps_used_up_warn(data):
    with pytest.warns(ConvergenceWarning, match="max_iter=2 steps used, the last of"):
        model = FactorAnalysis(2, max_iter=2).fit(data)
    assert model.n_iter_ == 2


def test_refuses(data):
    with pytest.raises(ValueError, match="not fitted yet: call fit first"):
        FactorAnalysis(2).transform(data)
    for bad in (0, 8, True):
        with pytest.raises(ValueError, match="n_components must be a whole number fro"):
            FactorAnalysis(bad).fit(data)
    for name in ("noise", "rotation"):
        with pytest.raises(ValueError, match=f"{name}='promax' must be one of"):
            FactorAnalysis(1, **cast(Any, {name: "promax"})).fit(data)
    for name in ("tol", "max_iter"):
        for bad in (0, -1):
            with pytest.raises(ValueError, match=f"{name} must be >"):
                FactorAnalysis(1, **cast(Any, {name: bad})).fit(data)
    for bad, text in (
        (np.array([[1.0, np.nan], [0, 1]]), "x has 1 non-finite value"),
        (np.array([["a", "b"]]), "x has dtype <U1: give real numbers"),
        (np.ones(3), "x is 1-dimensional"),
        (np.array([[1.0, 2], [1, 3]]), r"x\[0\] never moves"),
    ):
        with pytest.raises(ValueError, match=text):
            FactorAnalysis(1).fit(bad)
    with pytest.raises(ValueError, match=r"noise_variance_init has shape \(2,\): give"):
        FactorAnalysis(1, noise_variance_init=np.ones(2)).fit(data)
    with pytest.raises(ValueError, match=r"variances must be .* got -1.0 at \[0\]"):
        FactorAnalysis(1, noise_variance_init=-np.ones(7)).fit(data)
    model = FactorAnalysis(1).fit(data)
    with pytest.raises(ValueError, match=r"X has shape \(400, 3\): give rows of 7"):
        model.score(data[:, :3])
    broken = data.copy()
    broken[4, 2] = np.inf
    with pytest.raises(ValueError, match=r"X has 1 non-finite values, first at \[4, "):
        model.transform(broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FactorAnalysis(2).fit(data)


def test_in_scikit_learns_pipelines_and_searches(data):
    base = pytest.importorskip("sklearn.base")
    from sklearn.model_selection import cross_val_score, GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = FactorAnalysis(2, rotation="varimax")
    assert (
        repr(base.clone(model)) == "FactorAnalysis(n_components=2, rotation='varimax')"
    )
    steps = make_pipeline(StandardScaler(), model)
    assert steps.fit(data).transform(data).shape == (len(data), 2)
    assert np.isfinite(cross_val_score(steps, data, cv=2)).all()
    search = GridSearchCV(steps, {"factoranalysis__n_components": [1, 2]}, cv=2)
    assert search.fit(data).best_params_["factoranalysis__n_components"] in (1, 2)
