"""RMSNorm of a sum in one pass: the same values and gradients as by its formula, on one device and on a mesh.

The kernels are interpreted elsewhere (tests/pallas_kernels/test_rms_norm.py); here functions of XLA stand in for them.
"""

import contextlib
import functools

import jax
import numpy as np
import pytest

from longctx import MeshConfig, RMSNorm, make_mesh
from pallas_kernels import dispatch, rms_norm
from pallas_kernels.testing import H100, tracing_for

B, T, D = 4, 8, 16


@pytest.fixture
def kernels(monkeypatch):
    """Stands in for the kernels; records the shapes that they are called with."""
    called = []

    def add_and_normalise(x, delta, scale, *, eps):
        called.append(("forward", x.shape, delta is not None))
        x = x if delta is None else x + delta
        return x, rms_norm.normalised(x, scale, eps=eps)

    def gradients(x, scale, dnormed, dx, *, eps):
        called.append(("backward", x.shape, dx is not None, len(dnormed)))
        _, vjp = jax.vjp(functools.partial(rms_norm.normalised, eps=eps), x, scale)
        by_norm, dscale = vjp(sum(dnormed))
        return by_norm if dx is None else by_norm + dx, dscale

    for name, function in (("add_and_normalise", add_and_normalise), ("gradients", gradients)):
        monkeypatch.setattr(rms_norm, name, function)
    monkeypatch.setattr(rms_norm, "serves", lambda *_: True)
    return called


def values(apply, norm, *arrays):
    """What comes of it, and every gradient by name, with random cotangents."""
    out, vjp = jax.vjp(apply, norm, *arrays)
    cotangents = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(out)]
    dnorm, *dx = vjp(type(out)(cotangents))
    named = dict(zip(("total", "normed"), out, strict=False)) | dict(zip(("dx", "ddelta"), dx, strict=False))
    return named | {"dscale": dnorm.scale[...]}


def of_formula(norm, x, delta=None):
    x = x if delta is None else x + delta
    return x, norm(x)


def arrays(adds):
    norm = RMSNorm(D)
    norm.scale[...] = 1 + 0.1 * jax.random.normal(jax.random.key(9), (D,))
    return norm, *(jax.random.normal(jax.random.key(10 + i), (B, T, D)) for i in range(1 + adds))


MESHES = {
    "fsdp x context x tensor": (MeshConfig(fsdp=2, context_inner=2, tensor=2), (8, D)),
    "data x both context": (MeshConfig(data=2, context_outer=2, context_inner=2), (4, D)),
    "context": (MeshConfig(context_inner=8), (4, D)),
}


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_in_one_pass_is_the_formula(kernels, mesh, adds):
    norm, *inputs = arrays(adds)
    wanted = values(of_formula, norm, *inputs)
    config, shape = MESHES[mesh] if mesh else (None, (B * T, D))
    if mesh is None:
        got = values(RMSNorm.of_sum, norm, *inputs)
    else:
        with jax.set_mesh(make_mesh(config)):
            got = jax.jit(functools.partial(values, RMSNorm.of_sum))(norm, *inputs)
    assert set(kernels) == {("forward", shape, adds), ("backward", shape, True, 1)}
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_a_total_that_nobody_uses_has_no_cotangent(kernels):
    norm, x = arrays(adds=False)
    got = values(lambda norm, x: (norm.of_sum(x)[1],), norm, x)
    wanted = values(lambda norm, x: (norm(x),), norm, x)
    assert kernels == [("forward", (B * T, D), False), ("backward", (B * T, D), False, 1)]
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_a_norm_that_nobody_uses_has_no_gradient(kernels):
    norm, x, delta = arrays(adds=True)
    got = values(lambda norm, x, delta: (norm.of_sum(x, delta)[0],), norm, x, delta)
    assert [name for name, *_ in kernels] == ["forward"]
    np.testing.assert_array_equal(got["dx"], got["ddelta"])
    assert not np.any(got["dscale"])


@pytest.mark.parametrize("mesh", [None, *MESHES])
def test_gradients_of_several_uses_come_apart(kernels, mesh):
    norm, *inputs = arrays(adds=True)

    def of_uses(norm, x, delta):
        total, for_sine, for_cosine, unused = norm.of_sum(x, delta, uses=3)
        return total, jax.numpy.sin(for_sine) + jax.numpy.cos(2 * for_cosine)

    def wanted_of(norm, x, delta):
        return x + delta, jax.numpy.sin(norm(x + delta)) + jax.numpy.cos(2 * norm(x + delta))

    wanted = values(wanted_of, norm, *inputs)
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(make_mesh(MESHES[mesh][0])))
        got = jax.jit(functools.partial(values, of_uses))(norm, *inputs)
    assert kernels[-1][0] == "backward" and kernels[-1][-1] == 2
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_a_mesh_of_the_caller_is_left_to_the_partitioner(kernels):
    norm, x = arrays(adds=False)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(norm.of_sum)(x)[1], norm(x), rtol=1e-6)
    assert not kernels


@pytest.mark.parametrize(("dtype", "implementation"), [("bfloat16", "mosaic_gpu"), ("float32", None)])
def test_hopper_takes_the_kernels_for_16_bits(dtype, implementation):
    def both(norm, x):
        (total, normed), vjp = jax.vjp(RMSNorm.of_sum, norm, x, x)
        return vjp((total, normed))

    norm = RMSNorm(256)
    with tracing_for(H100), dispatch.record() as taken:
        jax.jit(both).trace(norm, jax.ShapeDtypeStruct((2, 1024, 256), dtype))
    ops = ["rms_norm", "rms_norm_gradients"] if implementation else []
    assert taken == [(op, implementation) for op in ops]
