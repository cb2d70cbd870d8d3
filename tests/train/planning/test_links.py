"""Groups of collectives as XLA writes them, and times on links."""

import json

import pytest

from train.devices import DeviceSpec
from train.planning.links import Links, Place, groups_of, sent_by_kernel

GPU = DeviceSpec(
    device_kinds=("x",),
    peak_tflops=1.0,
    memory_gb_per_s=1.0,
    link="switch",
    link_gb_per_s=100.0,
    network_gb_per_s=10.0,
    latency_us=0.0,
)
TPU = DeviceSpec(
    device_kinds=("y",), peak_tflops=1.0, memory_gb_per_s=1.0, link="torus", link_gb_per_s=100.0, latency_us=0.0
)
GB = 10**9


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("source_target_pairs={{0,1},{1,2},{2,0}}, metadata={}", [[0, 1], [1, 2], [2, 0]]),
        ("replica_groups={{0,1},{2,3}}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8], x=1", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x=1", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x=1", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x=1", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups={}, x=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups(attributes, groups):
    assert groups_of(attributes, 8) == groups


def test_an_unknown_way_of_writing_groups_is_an_error():
    with pytest.raises(ValueError, match="replica_groups: got .*flat"):
        groups_of("replica_groups=flat(8)", 8)


def switch(num_devices=16, on_a_host=8):
    return Links(GPU, [Place(i // on_a_host, (i,)) for i in range(num_devices)])


def test_a_permute_on_a_switch_takes_the_network_where_one_pair_crosses_hosts():
    assert switch().seconds("collective-permute", GB, [[0, 1], [1, 0]]) == (pytest.approx(0.01), "inside a host")
    assert switch().seconds("collective-permute", GB, [[0, 1], [7, 8]]) == (pytest.approx(0.1), "network")


def test_a_gather_over_hosts_shares_their_adapters():
    # 15 GB reach every device; the 8 GB of the other host come through 8 adapters of 10 GB/s together.
    seconds, where = switch().seconds("all-gather", 15 * GB, [list(range(16))])
    assert where == "network"
    assert seconds == pytest.approx(max(15 / 100, 16 / 2 / 8 / 10))


def torus(*extents):
    coords = [(x, y, z) for x in range(extents[0]) for y in range(extents[1]) for z in range(extents[2])]
    return Links(TPU, [Place(0, c) for c in coords])


def test_a_permute_on_a_torus_counts_the_hops_and_wraps_around():
    assert torus(4, 4, 4).seconds("collective-permute", GB, [[0, 1], [3, 0]]) == (pytest.approx(0.01), "torus, 1 hop")
    # 2 x 4 has no links around: from one end of 4 to the other are three hops.
    assert torus(2, 4, 1).seconds("collective-permute", GB, [[0, 3]]) == (pytest.approx(0.03), "torus, 3 hops")


def test_a_gather_on_a_torus_uses_the_links_of_the_axes_it_spans():
    line = [[0, 1, 2, 3]]
    assert torus(4, 4, 4).seconds("all-gather", GB, line)[0] == pytest.approx(0.01 / 2)
    assert torus(4, 4, 4).seconds("all-gather", GB, [list(range(64))]) == (pytest.approx(0.01 / 6), "torus, 3 axes")
    assert torus(2, 4, 1).seconds("all-gather", GB, line)[0] == pytest.approx(0.01)  # no way around
    assert torus(4, 4, 4).seconds("all-to-all", GB, line)[0] == pytest.approx(0.01 / 2)


def test_a_kernel_says_whom_it_sends_to():
    sends = {"bytes": 7, "mesh": {"a": 2, "b": 2, "c": 2}, "axes": ["a", "c"], "stride": 3}
    num_bytes, pairs = sent_by_kernel(f'kernel_metadata={{ "sends":{json.dumps(json.dumps(sends))} }}')
    assert num_bytes == 7
    # Rings of a and c, c the faster: 0, 1, 4, 5 and 2, 3, 6, 7; three ahead is one behind.
    assert sorted(pairs) == [[0, 5], [1, 0], [2, 7], [3, 2], [4, 1], [5, 4], [6, 3], [7, 6]]
    assert sent_by_kernel('kernel_metadata={ "mesh_axes":"[]" }') is None
