"""The tiles that a plan counts are those that the implementation of the step walks."""

from types import SimpleNamespace

import numpy as np
import pytest

from longctx.context_parallel import AttentionSharding, ContextParallelConfig
from longctx.mixers.attention import AttentionConfig
from pallas_kernels import BlockSizes
from train.planning import attention_work


@pytest.mark.parametrize(
    ("platform", "implementation", "mixer", "block"),
    [
        ("gpu", "xla", {}, 1024),
        ("gpu", "mosaic_gpu", {}, 128),
        ("gpu", "xla", {"block_q": 256, "block_kv": 256}, 256),
        ("cpu", "xla", {}, 128),
    ],
)
def test_tiles_are_those_of_the_implementation(platform, implementation, mixer, block, monkeypatch):
    counted = []

    def hop_tiles(mask, order, degree, block_sizes):
        counted.append(block_sizes)
        return np.ones((degree, degree), np.int64)

    monkeypatch.setattr(attention_work, "hop_tiles", hop_tiles)
    attention_work._cached_tiles.cache_clear()
    run = SimpleNamespace(
        ring_size=2,
        target=SimpleNamespace(platform=platform),
        config=SimpleNamespace(
            data=SimpleNamespace(seq_len=8192),
            row_order=lambda sizes: ContextParallelConfig().order(8192, sizes["context_inner"]),
        ),
        mesh=SimpleNamespace(shape={"context_inner": 2}),
        sharding=AttentionSharding(),
        parts=SimpleNamespace(model=SimpleNamespace(mixers={"far": AttentionConfig(num_heads=1, **mixer)})),
    )
    work = attention_work.AttentionWork(run, {"blockwise_attention_forward": implementation})
    assert work.imbalance == {"far": 1.0}
    assert counted == [BlockSizes(block_q=block, block_kv=block)]
    attention_work._cached_tiles.cache_clear()
