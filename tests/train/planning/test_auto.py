"""`strategy: auto`: what it chooses, what it says, and what it refuses."""

import jax
import pytest

from longctx import masks
from longctx.context_parallel import Layout
from train.assemble import config_of
from train.config import ConfigError
from train.devices import device_table
from train.planning import target
from train.planning.auto import Kind, Option, choose, group_sizes, resolve, start
from train.planning.cost import Layer
from train.planning.crossover import speeds
from train.planning.target import local_target, named_target

CPU_RING = "configs/cpu_ring8.yaml"
OPEN = ("context_parallel.strategy=auto", "context_parallel.window_strategy=null", "context_parallel.layout=null")
ALL = ("ring", "all_gather", "ulysses", "usp", "double_ring")


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine with neither libtpu nor a CUDA plugin."""
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def speeds_of_cpu(tmp_path):
    """A table as train.calibrate writes it."""
    path = tmp_path / "speeds.yaml"
    path.write_text(
        "devices:\n  cpu: {device_kinds: [cpu], peak_tflops: 0.1, attention: {xla: {forward: 0.05, backward: 0.05}}, "
        "memory_gb_per_s: 10.0, link: switch, link_gb_per_s: 1.0}\n"
    )
    return f"device_table={path}"


def chosen(seq_len, degree, *, num_heads=32, num_kv_heads=8, mask=None, strategies=ALL, **options):
    layer = Layer(
        mask=masks.causal() & masks.documents() if mask is None else mask,
        seq_len=seq_len,
        degree=degree,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
    )
    return choose(
        [Kind(name="all", layers=[(layer, {"forward": 1, "backward": 1})])],
        strategies={"all": strategies},
        layouts=[Layout(name=name) for name in ("zigzag", "contiguous", "striped")],
        groups=group_sizes(degree, 8),
        speeds=speeds(degree),
        **options,
    )["all"]


def test_over_hosts_it_takes_two_levels():
    usp = chosen(131_072, 64)
    assert (usp.option.strategy, usp.option.inner) == ("usp", 8)
    # One kv head cannot be split, and hops of 2,048 tokens do not hide on the network; a round of eight does better.
    rings = chosen(131_072, 64, num_kv_heads=1, strategies=("ring", "double_ring"), num_heads=4)
    assert (rings.option.strategy, rings.option.inner, rings.option.layout.name) == ("double_ring", 8, "zigzag")


def test_inside_a_host_it_takes_the_heads_where_they_divide_and_a_ring_where_they_do_not():
    assert chosen(131_072, 8).option.strategy == "ulysses"
    choice = chosen(131_072, 8, num_heads=15, num_kv_heads=5)
    assert choice.option.strategy == "ring" and choice.option.layout.name == "zigzag"
    assert set(choice.refused) == {"ulysses", "usp"}
    assert "Not ulysses: ulysses splits 15 query heads over 8 devices" in choice.reason


def test_a_window_takes_a_halo_in_order():
    window = masks.sliding_window(left=4095) & masks.documents()
    assert chosen(131_072, 8, mask=window, strategies=("ring", "halo")).option == Option("halo", Layout(), 8)


def test_what_holds_too_much_is_left_out():
    choice = chosen(1_048_576, 64, strategies=("all_gather", "ring"), most_held=2**32)
    assert choice.option.strategy == "ring"
    # Of 64 shards of 64 MiB all but its own, forward in bfloat16 and backward in float32, each twice.
    held = 2 * 63 * 3 * 64 / 1024
    assert choice.refused["all_gather"] == f"all_gather would hold {held:.1f} GiB of a device in what it sends"
    with pytest.raises(ValueError, match="auto found nothing that serves all layers: all_gather would hold"):
        chosen(1_048_576, 64, strategies=("all_gather",), most_held=2**32)


@pytest.mark.parametrize(
    ("path", "devices"), [("configs/gpu8_ring_128k.yaml", "h100:8"), ("configs/gpu64_1m.yaml", "h100:64")]
)
@pytest.mark.usefixtures("no_compiler")
def test_the_configs_carry_what_auto_chooses(path, devices):
    config = config_of(path)
    again, notes = resolve(config_of(path, OPEN), lambda: named_target(devices, device_table()))
    assert again.context_parallel == config.context_parallel and again.mesh == config.mesh
    with open(path, encoding="utf-8") as file:
        comment = " ".join(line.lstrip("# ").strip() for line in file if line.startswith("#"))
    for note in notes:
        assert note.splitlines()[0] in comment


def test_a_run_starts_with_what_was_chosen(speeds_of_cpu):
    config, mesh, notes = start(config_of(CPU_RING, (*OPEN, speeds_of_cpu)))
    assert not config.context_parallel.is_auto and config.context_parallel.layout is not None
    assert mesh.shape["context_outer"] * mesh.shape["context_inner"] == 8
    assert len(notes) == 2 and "strategy auto, layers with a window: " in notes[1]
    config.check_mesh(mesh.shape)


def test_what_the_config_names_is_kept(speeds_of_cpu):
    named = ("context_parallel={strategy: auto, layout: contiguous, window_strategy: halo}", speeds_of_cpu)
    config, _, _ = start(config_of(CPU_RING, named))
    assert (config.context_parallel.layout, config.context_parallel.window_strategy) == ("contiguous", "halo")


def test_without_speeds_it_says_how_to_get_them():
    with pytest.raises(ConfigError, match=r"auto needs the speeds of cpu devices.*train\.calibrate --out speeds\.yaml"):
        start(config_of(CPU_RING, OPEN))


def test_one_device_needs_no_choice():
    alone = ("mesh.context_inner=1", "distributed.virtual_cpu_devices=null")
    config = config_of(CPU_RING, (*OPEN, *alone))
    config, notes = resolve(config, lambda: local_target(jax.devices()[:1], device_table()))
    assert config.context_parallel.strategy == "ring" and notes == ("strategy auto: rows are not split",)
