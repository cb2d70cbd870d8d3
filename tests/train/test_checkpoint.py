from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longctx.sharding import MeshConfig, make_mesh
from train.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    Position,
    changed_settings,
    find_checkpoint,
    load_params,
    load_position,
    save_params,
)
from train.checkpoint.inspection import list_checkpoints
from train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from train.state import abstract_params, abstract_state, create_state

OPTIMIZER = make_optimizer(OptimizerConfig(), schedule=make_schedule(OptimizerConfig(), total_steps=10))


def mesh_of(**axes):
    return make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])


@pytest.fixture
def mesh():
    return mesh_of(fsdp=2)


@pytest.fixture
def state(stand_in, mesh):
    with jax.set_mesh(mesh):
        return create_state(stand_in, OPTIMIZER, mesh, seed=1)


def save(directory, state, steps, config=None, **settings):
    checkpoints = Checkpoints(directory, CheckpointConfig(**settings))
    for step in steps:
        position = Position(rows=8 * step, data="documents", config=config or {"seed": 0})
        checkpoints.save(state, step=step, position=position)
    checkpoints.close()
    return Checkpoints(directory, CheckpointConfig(**settings))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_restores_every_array_on_another_mesh(tmp_path, stand_in, state):
    checkpoints = save(tmp_path, state, [3], {"seed": 5, "data": {"sources": [1, 2]}})
    mesh = mesh_of(data=2, fsdp=4)
    abstract = abstract_state(stand_in, OPTIMIZER, mesh)
    checkpoints.check(abstract)
    restored, position = checkpoints.restore(abstract)
    assert_same(restored, state)
    assert (position.rows, position.config) == (24, {"seed": 5, "data": {"sources": [1, 2]}})
    jax.tree.map(lambda leaf, plan: np.testing.assert_equal(leaf.sharding, plan.sharding), restored, abstract)


def test_a_saved_state_may_be_donated_at_once(tmp_path, stand_in, mesh, state):
    before = jax.tree.map(lambda leaf: np.array(leaf), state)
    plus_one = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(state, step=1, position=Position(rows=0, data="documents", config={}))
    for _ in range(3):
        state = plus_one(state)
    checkpoints.wait()
    assert_same(checkpoints.restore(abstract_state(stand_in, OPTIMIZER, mesh))[0], before)
    checkpoints.close()


def test_keeps_the_latest_and_every_kth(tmp_path, state):
    save(tmp_path, state, [2, 4, 6, 8, 10], every=2, keep_last=2, keep_every=4)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdecimal()) == [4, 8, 10]


def test_a_step_is_saved_once(tmp_path, state):
    checkpoints = save(tmp_path, state, [2, 2])
    assert checkpoints.latest_step == 2


def test_another_shape_is_named(tmp_path, stand_in, mesh, state):
    class Wider(stand_in):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.layers[1].scale = nnx.Param(jnp.ones(10), logical_axes=("norm",))

    checkpoints = save(tmp_path, state, [2])
    message = (
        r"2: this config cannot resume from it: layers\.1\.scale has shape \[8\] in the checkpoint and \[10\] here; "
        r"choose another run_dir, with init_from="
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoints.check(abstract_state(Wider, OPTIMIZER, mesh))
    with pytest.raises(CheckpointError, match=r"weights do not fit the model: layers\.1\.scale has shape \[8\]"):
        load_params(tmp_path, abstract_params(Wider, mesh))


def test_a_missing_and_an_unknown_parameter_are_named(tmp_path, stand_in, mesh, state):
    class More(stand_in):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.extra = nnx.Param(jnp.ones(8), logical_axes=("norm",))

    checkpoints = save(tmp_path / "plain", state, [2])
    with pytest.raises(CheckpointError, match="extra is not in the checkpoint"):
        checkpoints.check(abstract_state(More, OPTIMIZER, mesh))
    with jax.set_mesh(mesh):
        more = create_state(More, OPTIMIZER, mesh, seed=1)
    checkpoints = save(tmp_path / "more", more, [2])
    with pytest.raises(CheckpointError, match="extra is in the checkpoint but not in this config"):
        checkpoints.check(abstract_state(stand_in, OPTIMIZER, mesh))


def test_another_optimizer_is_named(tmp_path, stand_in, mesh, state):
    import optax

    checkpoints = save(tmp_path, state, [2])
    with pytest.raises(CheckpointError, match=r"this config cannot resume from it: opt_state\."):
        checkpoints.check(abstract_state(stand_in, optax.sgd(0.1, momentum=0.9), mesh))


def test_a_truncated_checkpoint_names_the_one_before(tmp_path, stand_in, mesh, state):
    checkpoints = save(tmp_path, state, [2, 4])
    for file in (tmp_path / "4" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    abstract = abstract_state(stand_in, OPTIMIZER, mesh)
    with pytest.raises(CheckpointError, match="4: cannot be read .*; delete that folder to go on from step 2"):
        checkpoints.check(abstract)
        checkpoints.restore(abstract)
    with pytest.raises(
        CheckpointError, match="4: cannot be read .*; where .* shows an earlier one, delete that folder"
    ):
        load_params(tmp_path, abstract.params)


@pytest.mark.parametrize(("steps", "kept"), [([2, 4], "step 2 is the last complete one"), ([4], "none is complete")])
def test_a_save_that_was_cut_off_is_removed_with_a_note(tmp_path, state, steps, kept):
    save(tmp_path, state, steps).close()
    cut_off = tmp_path / "4.orbax-checkpoint-tmp"
    (tmp_path / "4").rename(cut_off)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.notes == [f"{cut_off}: a checkpoint whose saving was cut off; it is removed, {kept}"]
    checkpoints.save(state, step=4, position=Position(rows=8, data="documents", config={}))
    checkpoints.close()
    assert not cut_off.exists() and not Checkpoints(tmp_path, CheckpointConfig()).notes


def test_a_disk_that_cannot_be_written_is_named(tmp_path, state, monkeypatch):
    checkpoints = save(tmp_path / "checkpoints", state, [2])

    def full(*_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: Failed writing: "d/95": No space left on device [source ...]')

    monkeypatch.setattr(checkpoints._manager, "save", full)
    message = (
        "checkpoints: cannot be written: No space left on device; make room there, then run the same command again"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoints.save(state, step=4, position=Position(rows=0, data="documents", config={}))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints: cannot be written: Not a directory; choose another"):
        Checkpoints(tmp_path / "file" / "checkpoints", CheckpointConfig())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, where nobody makes folders")
def test_a_folder_that_cannot_be_made_is_told():
    with pytest.raises(CheckpointError, match="cannot be written: /proc/run cannot be made; choose another run_dir"):
        Checkpoints(Path("/proc/run/checkpoints"), CheckpointConfig())


def test_a_foreign_checkpoint_is_refused(tmp_path, stand_in, mesh):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "model.bin").write_bytes(b"weights")
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(CheckpointError, match="7: cannot be read as a checkpoint of this trainer .*no earlier"):
        checkpoints.check(abstract_state(stand_in, OPTIMIZER, mesh))
    with pytest.raises(CheckpointError, match="7: holds no parameters; pass a checkpoint of this trainer"):
        load_params(tmp_path, abstract_params(stand_in, mesh))


def test_init_from_a_run_a_folder_or_a_step(tmp_path, stand_in, state):
    directory = tmp_path / "run" / "checkpoints"
    save(directory, state, [2, 4])
    mesh = mesh_of(data=2, fsdp=2)
    for source in (tmp_path / "run", directory, directory / "2"):
        assert_same(load_params(source, abstract_params(stand_in, mesh)), state.params)
    assert find_checkpoint(tmp_path / "run") == (directory, 4)
    assert find_checkpoint(directory / "2") == (directory, 2)
    with pytest.raises(CheckpointError, match="nowhere: holds no complete checkpoint; pass a run's folder"):
        load_params(tmp_path / "nowhere", abstract_params(stand_in, mesh))


def test_weights_alone_are_loaded_and_not_resumed_from(tmp_path, stand_in, mesh, state):
    directory = tmp_path / "checkpoints"
    params = jax.device_get(state.params)
    save_params(directory, params, Position(rows=0, data="", config={"seed": 3}, weights_only=True))
    assert_same(load_params(tmp_path, abstract_params(stand_in, mesh)), state.params)
    assert load_position(directory, 0).config == {"seed": 3}
    assert [(listed.step, listed.problem) for listed in list_checkpoints(tmp_path)] == [(0, None)]
    checkpoints = Checkpoints(directory, CheckpointConfig())
    message = r"0: holds weights alone, from which no run can resume; choose another run_dir, with init_from="
    with pytest.raises(CheckpointError, match=message):
        checkpoints.check(abstract_state(stand_in, OPTIMIZER, mesh))
    (directory / "0" / "position" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match=r"0: its position cannot be read"):
        load_position(directory, 0)


def test_init_from_casts_to_the_parameters_dtype(tmp_path, stand_in, mesh, state):
    save(tmp_path, state, [2])
    narrow = abstract_params(lambda rngs: stand_in(rngs, param_dtype=jnp.bfloat16), mesh)
    loaded = load_params(tmp_path, narrow)
    np.testing.assert_array_equal(loaded["embedding"], state.params["embedding"].astype(jnp.bfloat16))


def test_changed_settings():
    old = {"seed": 0, "data": {"sources": [{"weight": 1.0}], "seq_len": 8}, "gone": True}
    new = {"seed": 1, "data": {"sources": [{"weight": 1.0}, {"weight": 2.0}], "seq_len": 8}}
    assert changed_settings(old, new) == ["data.sources.1.weight: null -> 2.0", "gone: true -> null", "seed: 0 -> 1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every: got 0, wanted 1 or more, or null"),
        ({"keep_last": 0}, "keep_last: got 0, wanted 1 or more"),
        ({"every": None, "keep_every": 15}, "keep_every: got 15 with every=null, which saves the last step alone"),
        ({"every": 10, "keep_every": 15}, "keep_every: got 15, which is no multiple of every=10"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**settings)


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path, state):
    holder = save(tmp_path, state, [2])
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()  # what it is about to complete
    with pytest.raises(CheckpointError, match="another process is training this run; wait until it ends, or choose"):
        Checkpoints(tmp_path, CheckpointConfig())
    assert (tmp_path / "4.orbax-checkpoint-tmp").is_dir()
    holder.close()
    Checkpoints(tmp_path, CheckpointConfig()).close()


def test_a_run_is_found_whose_checkpoints_lie_elsewhere(tmp_path, state):
    save(tmp_path / "elsewhere", state, [2]).close()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(f"checkpoint: {{dir: {tmp_path / 'elsewhere'}}}")
    assert find_checkpoint(tmp_path / "run") == (tmp_path / "elsewhere", 2)
    assert [found.step for found in list_checkpoints(tmp_path / "run")] == [2]
    (tmp_path / "run/config.yaml").write_text("- neither: [yaml")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path / "run")
