"""Dispatch: preference, refusals, reasons, and the platform it reads."""

import logging

import jax
import pytest

from pallas_kernels import dispatch
from pallas_kernels.testing import tracing_for


def serves(result):
    return lambda *args, **kwargs: result


def refuses(reason):
    def implementation(*args, **kwargs):
        raise NotImplementedError(reason)

    return implementation


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "current_platform", lambda: "gpu")
    dispatch._log_choice.cache_clear()


def test_the_first_that_serves_is_taken_and_said_once(caplog):
    implementations = {"xla": serves("xla"), "mosaic_gpu": refuses("head dim 48"), "cudnn": serves("cudnn")}
    with caplog.at_level(logging.INFO, dispatch.__name__), dispatch.record() as taken:
        assert dispatch.run("op", implementations, None) == "cudnn"
        assert dispatch.run("op", implementations, None) == "cudnn"
    assert taken == [("op", "cudnn")] * 2
    assert [record.getMessage() for record in caplog.records] == ["op on gpu: using cudnn; passed over: head dim 48"]


def test_a_named_implementation_never_falls_back():
    implementations = {"xla": serves("xla"), "mosaic_gpu": refuses("head dim 48")}
    with pytest.raises(NotImplementedError, match="head dim 48"):
        dispatch.run("op", implementations, "mosaic_gpu")
    with pytest.raises(NotImplementedError, match="op: there is no 'cudnn' implementation; there are"):
        dispatch.run("op", implementations, "cudnn")
    with pytest.raises(ValueError, match="op: implementation='cuda', wanted None or one of"):
        dispatch.run("op", implementations, "cuda")


def test_when_all_refuse_every_reason_is_shown():
    implementations = {"xla": refuses("too long"), "mosaic_gpu": refuses("head dim 48")}
    with pytest.raises(ExceptionGroup, match="op: no implementation serves this call on gpu") as group:
        dispatch.run("op", implementations, None)
    assert [str(reason) for reason in group.value.exceptions] == ["head dim 48", "too long"]


def test_a_wrong_call_is_not_a_refusal():
    def wrong(*args, **kwargs):
        raise ValueError("wrong call")

    with pytest.raises(ValueError, match="wrong call"):
        dispatch.run("op", {"mosaic_gpu": wrong, "xla": serves("xla")}, None)


def test_the_reference_is_never_taken_unasked():
    assert all("reference" not in names for names in dispatch.PREFERENCE.values())


@pytest.mark.parametrize(("platform", "expected"), [("tpu", "tpu"), ("cuda", "gpu"), ("rocm", "gpu")])
def test_the_mesh_in_scope_names_the_platform(monkeypatch, platform, expected):
    monkeypatch.undo()
    assert dispatch.current_platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="some chip", num_cores=None, platform=platform)
    with tracing_for(device):
        assert dispatch.current_platform() == expected
