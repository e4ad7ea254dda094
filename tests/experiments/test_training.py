"""Training goes on where it was stopped, to the same bits."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gradflow.experiments import samples, training
from gradflow.experiments.training import Network, train, TrainingConfig
from gradflow.moments import Moments
from gradflow.precision import precision
from gradflow.store.checkpoint import Checkpoint
from gradflow.store.folder import Store


CONFIG = TrainingConfig(draws=2, steps=70, every=20, batch=4, rate=0.05)


class Line(eqx.Module):
    weight: jnp.ndarray
    name: str = "line"


def loss(point, x, *, key):
    return jnp.sum((point.weight * x - x + 0.1 * jr.normal(key, x.shape)) ** 2)


def networks():
    return {
        name: Network(
            lambda key: Line(jr.normal(key, (3,))),
            loss,
            (jnp.asarray(np.random.default_rng(0).normal(size=(9, 3))) * scale,),
            jnp.asarray(9),
            lambda point, key: {"weight": np.asarray(point.weight)},
        )
        for name, scale in (("one", 1.0), ("two", 0.5))
    }


def trained(store=None):
    found, _ = train(networks(), CONFIG, data="lines", progress=False, store=store)
    return {name: one["weight"] for name, one in found.items()}


def open_store(folder):
    return Store(folder, {"a": 1}, experiment="lines", chunk=1)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A folder in which the second network was stopped after its second checkpoint."""
    count = []

    def write(self, step, arrays):
        whole(self, step, arrays)
        count.append(step)
        if len(count) == 5:
            raise KeyboardInterrupt

    whole = Checkpoint.write
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "write", write)
        with open_store(tmp_path) as store, pytest.raises(KeyboardInterrupt):
            trained(store)
    assert count == [20, 40, 60, 20, 40]
    return tmp_path


def same(found, wanted):
    return all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_resumed_is_uninterrupted(stopped, monkeypatch):
    wanted = trained()
    assert not np.array_equal(wanted["one"][0], wanted["one"][1])
    steps = []
    whole = training._advanced
    monkeypatch.setattr(
        training,
        "_advanced",
        lambda *args, **rest: (steps.append(int(args[-1][0])), whole(*args, **rest))[1],
    )
    with open_store(stopped) as store:
        assert same(trained(store), wanted)
    # The first network was done, the second one at step 40.
    assert steps == [40, 60, *([0, 20, 40, 60] * 2)]
    assert not list(stopped.rglob("*.state"))
    with open_store(stopped) as store:
        assert same(trained(store), wanted)
    assert len(steps) == 10


def test_a_damaged_checkpoint_is_not_used(stopped, caplog):
    (path,) = stopped.rglob("*.state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with open_store(stopped) as store:
        assert same(trained(store), trained())
    assert "can't be used (its checksum does not match)" in caplog.text


def test_a_folder_with_a_checkpoint_only_keeps_its_settings(tmp_path, monkeypatch):
    def write(self, step, arrays):
        whole(self, step, arrays)
        raise KeyboardInterrupt

    whole = Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", write)
    with open_store(tmp_path) as store, pytest.raises(KeyboardInterrupt):
        trained(store)
    with pytest.raises(ValueError, match="was started with different settings: a"):
        with Store(tmp_path, {"a": 2}, experiment="lines", chunk=1):
            pass


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def write(self, step, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoint, "write", write)
    with open_store(tmp_path) as store:
        with pytest.raises(RuntimeError, match="no space left .* are safe; free space"):
            trained(store)


def test_other_data_are_refused(stopped):
    with open_store(stopped) as store:
        with pytest.raises(ValueError, match="data: saved lines, asked others"):
            train(networks(), CONFIG, data="others", progress=False, store=store)


@pytest.mark.slow
def test_gaussian_samples_have_the_moments():
    name, rows = samples.mnist_samples(None, 1, 0)
    assert name.startswith("Gaussian") and rows.shape == (6742, 784)
    assert rows.dtype == np.float32
    wanted = np.asarray(samples.mnist(1).xx)
    found = rows.T.astype(float) @ rows / len(rows)
    # Of a product of two normals: the variance is xx_ii xx_jj + xx_ij^2.
    own = np.diagonal(wanted)
    error = np.sqrt((np.outer(own, own) + wanted**2) / len(rows))
    assert np.abs(found - wanted).max() < (6 * error + 1e-6).max()


def test_quadrants_are_those_of_the_moments():
    """The same pixels as `datasets.mnist` takes, by the moments."""
    rows = np.random.default_rng(0).normal(size=(5, 784))
    x, y = samples.quadrants(rows)
    assert np.array_equal(x[:, :14], rows.reshape(-1, 28, 28)[:, 14, :14])
    whole = np.asarray(samples.mnist(1).xx)
    by_row = samples.quadrants(samples.quadrants(whole)[0].T)
    task = samples.mnist(1, task="quadrant")
    np.testing.assert_array_equal(by_row[0], task.xx)
    np.testing.assert_array_equal(by_row[1], task.xy)


def test_centered_moments_are_what_biases_leave():
    with precision("float64"):
        rows = np.random.default_rng(0).normal(size=(50, 3)) + 2.0
        found = samples.centered_moments(rows[:, :1], rows[:, 1:])
        assert isinstance(found, Moments)
        wanted = np.cov(rows.T, bias=True)
        np.testing.assert_allclose(found.yy, wanted[1:, 1:], rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"rate": float("nan")}, "rate must be a finite number > 0, got nan"),
        ({"delta": 1.0}, "delta must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_a_folder_without_images():
    with pytest.raises(ValueError, match="nowhere has no file train-images"):
        samples.mnist_samples("nowhere", 1, 0)
