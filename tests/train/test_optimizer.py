import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.optimizer import OptimizerConfig, decayed, make_optimizer, make_schedule


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # what the step sets around optax
        yield


def values(config, steps, total_steps):
    schedule = make_schedule(config, total_steps=total_steps)
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_cosine_with_warmup():
    config = OptimizerConfig(learning_rate=0.8, warmup_steps=4, final_lr_ratio=0.1)
    # t = step + 1: warm-up t/4, then p = (t - 4) / 16; half way (p = 1/2) lies at (1 + 0.1) / 2 of the peak.
    np.testing.assert_allclose(values(config, [0, 1, 3, 11, 19, 40], 20), [0.2, 0.4, 0.8, 0.44, 0.08, 0.08], rtol=1e-6)


def test_cosine_with_a_shorter_decay():
    config = OptimizerConfig(learning_rate=1.0, decay_steps=10, final_lr_ratio=0.2)
    np.testing.assert_allclose(values(config, [4, 9, 15], 20), [0.6, 0.2, 0.2], rtol=1e-6)


def test_wsd():
    config = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=2, decay_steps=5, final_lr_ratio=0.0)
    np.testing.assert_allclose(values(config, [0, 1, 7, 14, 15, 17, 19], 20), [0.5, 1, 1, 1, 0.8, 0.4, 0.0], atol=1e-6)


def test_wsd_decays_over_the_last_tenth():
    config = OptimizerConfig(learning_rate=1.0, schedule="wsd", final_lr_ratio=0.5)
    np.testing.assert_allclose(values(config, [0, 17, 18, 19], 20), [1, 1, 0.75, 0.5], rtol=1e-6)


def test_constant():
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_steps=2)
    np.testing.assert_allclose(values(config, [0, 1, 2, 100], 200), [0.25, 0.5, 0.5, 0.5], rtol=1e-6)


def test_weight_decay_touches_matrices_only():
    params = {
        "embedding": jnp.ones((4, 2)),
        "norm": {"scale": jnp.ones((3, 2))},  # stacked by a layer scan
        "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((3, 2))},
        "sinks": jnp.ones((3, 2)),
        "gain": jnp.ones(2),
    }
    assert decayed(params) == {
        "embedding": True,
        "norm": {"scale": False},
        "dense": {"kernel": True, "bias": False},
        "sinks": False,
        "gain": False,
    }
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", weight_decay=0.1)
    optimizer = make_optimizer(config, schedule=make_schedule(config, total_steps=2))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["embedding"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0.0)


def test_adamw_step_by_hand():
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0
    )
    optimizer = make_optimizer(config, schedule=make_schedule(config, total_steps=9))
    params = {"w": jnp.array([[1.0, 2.0]])}
    state = optimizer.init(params)
    # The first gradient has norm 5 and is scaled to norm 1; the second is smaller than the limit.
    g1, g2 = np.array([[0.6, 0.8]]), np.array([[0.5, -0.5]])
    updates, state = optimizer.update({"w": jnp.array([[3.0, 4.0]])}, state, params)
    np.testing.assert_allclose(updates["w"], -0.1 * g1 / np.abs(g1), rtol=1e-5)
    updates, state = optimizer.update({"w": jnp.array([[0.5, -0.5]])}, state, params)
    mean = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    square = (0.95 * 0.05 * g1**2 + 0.05 * g2**2) / (1 - 0.95**2)
    np.testing.assert_allclose(updates["w"], -0.1 * mean / np.sqrt(square), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, wanted a number above 0"),
        ({"b2": 1.0}, "b2: got 1.0, wanted 0 <= b2 < 1"),
        ({"warmup_steps": -1}, "warmup_steps: got -1, wanted 0 or more"),
        ({"final_lr_ratio": 1.5}, "final_lr_ratio: got 1.5, wanted a fraction"),
        ({"clip_norm": 0.0}, "clip_norm: got 0.0, wanted a number above 0, or null"),
        ({"schedule": "constant", "decay_steps": 3}, "decay_steps: got 3 with schedule=constant"),
        ({"schedule": "constant", "final_lr_ratio": 0.5}, "final_lr_ratio: got 0.5 with schedule=constant"),
        ({"decay_steps": 0}, "decay_steps: got 0, wanted 1 or more"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 20}, "optimizer.warmup_steps: got 20, wanted fewer than training.steps=20"),
        (
            {"schedule": "wsd", "warmup_steps": 10, "decay_steps": 11},
            "optimizer.decay_steps: got 11 after warmup_steps=10",
        ),
    ],
)
def test_schedules_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(OptimizerConfig(**settings), total_steps=20)


def test_moments_in_bfloat16():
    """Kept in half the bytes between updates that are nearly those in float32."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((8, 8)), jnp.float32)}
    gradients = [jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params) for _ in range(6)]
    updates = {}
    for dtype in ("float32", "bfloat16"):
        config = OptimizerConfig(moments_dtype=dtype, clip_norm=None)
        optimizer = make_optimizer(config, schedule=make_schedule(config, total_steps=9))
        state = optimizer.init(params)
        for of_step in gradients:
            updates[dtype], state = jax.jit(optimizer.update)(of_step, state, params)
        floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert [(leaf.shape, str(leaf.dtype)) for leaf in floats] == 2 * [((8, 8), dtype)]
    np.testing.assert_allclose(updates["bfloat16"]["kernel"], updates["float32"]["kernel"], rtol=0.05, atol=2e-5)


def test_means_too_slow_for_bfloat16_are_refused():
    with pytest.raises(ValueError, match="moments_dtype: got bfloat16 with b2=0.999, wanted at most 0.99, since"):
        OptimizerConfig(moments_dtype="bfloat16", b2=0.999)
