"""Tile sizes, as data: how many queries and keys a block holds, by family, implementation and platform."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Tokens a block of queries and a block of keys hold."""

    block_q: int
    block_kv: int

    def __post_init__(self):
        for name in ("block_q", "block_kv"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"BlockSizes: {name}={value!r}, wanted a whole number of tokens >= 1")

    def fit(self, q_len: int, kv_len: int) -> "BlockSizes":
        """The same sizes, no larger than the sequences."""
        return BlockSizes(block_q=min(self.block_q, q_len), block_kv=min(self.block_kv, kv_len))


# What a schedule is built for unless it is told otherwise. On a GPU it is what the Hopper kernel walks, on a CPU small
# tiles stay in its cache.
BLOCKWISE_ATTENTION = {
    "cpu": BlockSizes(block_q=128, block_kv=128),
    "gpu": BlockSizes(block_q=128, block_kv=128),
    "tpu": BlockSizes(block_q=512, block_kv=1024),
}

# Where XLA wants larger tiles than those: there it merges blocks of the schedule. It materialises one
# [B, N, block_q, block_kv] float32 tile of logits at a time, and large ones keep a GPU's matmuls busy.
XLA_TILES = {"gpu": BlockSizes(block_q=1024, block_kv=1024)}

# What the Hopper kernel walks: by head dim of q and k where it makes its own schedule, and where one is handed to it,
# which must do for all. Three warpgroups of 64 queries hide more of the softmax, and at head dim 64 there are registers
# for them; at 256 shared memory holds blocks of 64 keys.
MOSAIC_GPU_ATTENTION = {
    64: BlockSizes(block_q=192, block_kv=128),
    128: BlockSizes(block_q=128, block_kv=128),
    192: BlockSizes(block_q=128, block_kv=128),
    256: BlockSizes(block_q=128, block_kv=64),
    "schedule": BLOCKWISE_ATTENTION["gpu"],
}

# What the TPU kernels walk where they make their own schedule, by generation. In the compiler's schedule a pair of
# tokens takes 5 % fewer instructions in 1024 x 1024 than in 512 x 1024 on v5e and v5p, which does not pay for what a
# diagonal of larger blocks computes for nothing, and 10 % fewer on v6e and tpu7x; there 512 queries would also read
# keys faster than memory gives them. A schedule that is handed in has its own sizes.
MOSAIC_TPU_ATTENTION = {
    "v5e": BlockSizes(block_q=512, block_kv=1024),
    "v5p": BlockSizes(block_q=512, block_kv=1024),
    "v6e": BlockSizes(block_q=1024, block_kv=1024),
    "tpu7x": BlockSizes(block_q=1024, block_kv=1024),
}
