"""The output projection and its cross-entropy in one op, which never holds the logits of all tokens.

Tokens go through in tiles. Where gradients are wanted, the forward pass computes them too, tile by tile, while the
tile's logits are there: a loss sum is linear in its cotangent, so the backward pass only scales what the forward pass
computed, and the projection's three matmuls are all that are done. An evaluation, which wants no gradients, does one.

Over the mesh of `longctx.make_mesh` each device walks its own tokens, with the vocabulary split over `tensor`. Outside
the loop over tiles the table is gathered once and its gradient scattered once, whatever the number of tiles; inside it
only where the vocabulary is split, two numbers a token and split, and one more for predictions, are combined over the
devices of the split.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from longctx.arguments import check_unembedding
from longctx.losses import LossSums
from longctx.token_shards import TokenShards, in_tiles, psum
from longctx.unembedding import soft_capped
from pallas_kernels.softmax_statistics import softmax_statistics

GRADIENT_SCOPE = "gradient"  # names, in a compiled program, what the forward pass computes of the backward pass

_TILE = 4096
_MAX_LOGITS_BYTES = 2**31


class TokenScores(NamedTuple):
    """What the logits of a token say, without the logits."""

    nll_BT: Float32[Array, "B T"]
    """Negative log likelihood of the target, in nats; NaN for one outside the vocabulary."""
    log_normaliser_BT: Float32[Array, "B T"]
    """logsumexp of the logits."""
    predictions_BT: Int32[Array, "B T"]
    """The id of the greatest logit, the first of equals."""


def default_tile(vocab_size: int) -> int:
    """Tokens of a tile, a device: 4096, or as many as have float32 logits of 2 GiB, in multiples of 128.

    The gradient of the table is read and written once a tile, 8 V D bytes beside its 6 tile V D FLOPs, so a tile of
    fewer tokens spends more of its time on that, whatever V and D are. `benchmarks.run --family loss` times tiles.

    Args:
      vocab_size: Token ids that one device has.
    """
    fitting = _MAX_LOGITS_BYTES // (4 * vocab_size) // 128 * 128
    return max(128, min(_TILE, fitting))


def fused_cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int32[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    tile: int | None = None,
) -> LossSums:
    """`cross_entropy(logits_of(hidden, table), targets, weights)`, a tile of tokens at a time.

    Matmuls multiply in hidden's dtype and accumulate in float32; logits, statistics and sums are float32, and so is the
    gradient of the table until it is whole. The cotangent of the logits is rounded to hidden's dtype.

    Args:
      hidden_BTD: Normalised outputs of the last layer.
      table_VD: One row a token id, of any float dtype; cast to hidden's.
      targets_BT: Index of the token that came; arbitrary where the weight is zero. Elsewhere an index outside the
        vocabulary makes the loss NaN.
      weights_BT: Weight of each token; zero leaves it out.
      z_loss: Weight of the squared log normaliser.
      soft_cap: Logits become cap * tanh(logits / cap); None leaves them.
      tile: Tokens of a tile on each device; None takes `default_tile`. It changes the order of float32 sums alone.

    Returns: sums, with gradients of all of them for the weights and of loss_sum for hidden and table; of nll_sum too
      where z_loss is 0.
    Raises: ValueError where shapes or dtypes do not fit; NotImplementedError, in the backward pass, where nll_sum is
      differentiated with z_loss.
    Memory: O(tile V) for logits, 4 V D bytes for the table's gradient, and hidden's gradient, which live from the
      forward to the backward pass.
    Cost: 6 B T V D FLOPs with gradients and none in the backward pass; 2 B T V D without. A gradient that nobody wants,
      such as that of a frozen table, is left out. A forward pass under differentiation does the work of both, also
      where its gradient is thrown away.
    """
    call = _checked("fused_cross_entropy", hidden_BTD, table_VD, targets_BT, soft_cap, tile)
    if weights_BT.shape != targets_BT.shape or not jnp.issubdtype(weights_BT.dtype, jnp.floating):
        raise ValueError(
            f"fused_cross_entropy: weights are {weights_BT.dtype}{list(weights_BT.shape)}, wanted floats of the "
            f"targets' shape {list(targets_BT.shape)}"
        )
    return _sums(dataclasses.replace(call, z_loss=z_loss), hidden_BTD, table_VD, targets_BT, weights_BT)


def token_scores(
    hidden_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int32[Array, "B T"],
    *,
    soft_cap: float | None = None,
    tile: int | None = None,
) -> TokenScores:
    """What an evaluation needs of each token: its loss and the likeliest id.

    Made for evaluation: a derivative would hold what this avoids.

    Args: As of `fused_cross_entropy`.
    Raises: ValueError where shapes or dtypes do not fit.
    Memory: O(tile V). Cost: 2 B T V D FLOPs.
    """
    call = _checked("token_scores", hidden_BTD, table_VD, targets_BT, soft_cap, tile)
    tokens = call.shards.tokens

    def shard(hidden, table, targets):
        (statistics, predictions), _, _ = _walk(call, hidden, table, targets, with_predictions=True)
        nll = jnp.where(_is_outside(targets, call.vocab_size), jnp.nan, statistics.nll)
        return TokenScores(nll, statistics.log_normaliser, predictions)

    in_specs, out_specs = (call.hidden, call.table, tokens), TokenScores(*(tokens,) * 3)
    return call.map(shard, in_specs, out_specs)(hidden_BTD, table_VD, targets_BT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call.

    Attributes:
      shards: How tokens are split.
      table: How the table is.
    """

    shards: TokenShards
    table: PartitionSpec
    vocab_size: int
    tile: int | None
    soft_cap: float | None
    z_loss: float = 0.0

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """Over which the vocabulary is split."""
        return self.shards.tensor_axes(self.table[0]) if self.table else ()

    @property
    def hidden(self) -> PartitionSpec:
        return PartitionSpec(*self.shards.tokens, None)

    def map(self, shard: Callable, in_specs, out_specs) -> Callable:
        return self.shards.map(shard, in_specs, out_specs, with_tensor=True)


def _checked(name: str, hidden, table, targets, soft_cap: float | None, tile: int | None) -> _Call:
    check_unembedding(name, hidden, table, soft_cap=soft_cap)
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"{name}: targets are {targets.dtype}{list(targets.shape)}, wanted int32{list(hidden.shape[:2])}"
        )
    if tile is not None and tile < 1:
        raise ValueError(f"{name}: tile is {tile}, wanted None or a number of tokens >= 1")
    shards = TokenShards.of(hidden.shape[:2])
    return _Call(
        shards=shards,
        table=shards.of_parameter(("vocab", "embed"), table.shape),
        vocab_size=table.shape[0],
        tile=tile,
        soft_cap=soft_cap,
    )


class _Statistics(NamedTuple):
    """Of each token, float32: what its sums and the cotangent of its logits need. nll is not NaN yet."""

    nll: jax.Array
    log_normaliser: jax.Array


# Differentiated outside the shard_map, whose transpose would add a reduction over every axis that an input is not split
# over.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(call: _Call, hidden, table, targets, weights) -> LossSums:
    sums, _, _, _ = _on_mesh(call, hidden, table, targets, weights, with_dhidden=False, with_dtable=False)
    return sums


def _sums_forward(call: _Call, hidden, table, targets, weights):
    sums, statistics, dhidden, dtable = _on_mesh(
        call,
        *(primal.value for primal in (hidden, table, targets, weights)),
        with_dhidden=hidden.perturbed,
        with_dtable=table.perturbed,
    )
    dtable = None if dtable is None else dtable.astype(table.value.dtype)
    of_weights = (statistics, weights.value) if weights.perturbed else None
    return sums, (dhidden, dtable, of_weights)


def _sums_backward(call: _Call, residuals, cotangents: LossSums):
    dhidden, dtable, of_weights = residuals
    zero = jnp.float32(0)
    dloss, dnll, dweight = (zero if _is_zero(cotangent) else cotangent for cotangent in cotangents)
    if call.z_loss and (dhidden is not None or dtable is not None) and not _is_zero(cotangents.nll_sum):
        raise NotImplementedError(
            f"fused_cross_entropy: the gradient of nll_sum was asked for with z_loss={call.z_loss}, and the forward "
            "pass computed that of loss_sum; differentiate loss_sum, or take cross_entropy(logits_of(...))"
        )
    scale = dloss + dnll

    def scaled(gradient):
        return None if gradient is None else (scale * gradient.astype(jnp.float32)).astype(gradient.dtype)

    dweights = None
    if of_weights is not None:
        statistics, weights = of_weights
        penalty = call.z_loss * jnp.square(statistics.log_normaliser)
        dweights = (dloss * (statistics.nll + penalty) + dnll * statistics.nll + dweight).astype(weights.dtype)
    return scaled(dhidden), scaled(dtable), None, dweights


_sums.defvjp(_sums_forward, _sums_backward, symbolic_zeros=True)


def _is_zero(cotangent) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def _on_mesh(call: _Call, hidden, table, targets, weights, *, with_dhidden: bool, with_dtable: bool):
    """Sums, statistics and the gradients of loss_sum that are wanted, None for the others."""
    tokens = call.shards.tokens

    def shard(hidden, table, targets, weights):
        weights = weights.astype(jnp.float32)
        (statistics, _), dhidden, dtable = _walk(
            call, hidden, table, targets, weights, with_dhidden=with_dhidden, with_dtable=with_dtable
        )
        outside = _is_outside(targets, call.vocab_size) & (weights != 0)
        statistics = statistics._replace(nll=jnp.where(outside, jnp.nan, statistics.nll))
        nll_sum = jnp.sum(weights * statistics.nll)
        penalty_sum = call.z_loss * jnp.sum(weights * jnp.square(statistics.log_normaliser))
        sums = psum(jnp.stack([nll_sum + penalty_sum, nll_sum, jnp.sum(weights)]), call.shards.axes)
        return LossSums(*sums), statistics, dhidden, dtable

    out_specs = (
        LossSums(*(PartitionSpec(),) * 3),
        _Statistics(tokens, tokens),
        call.hidden if with_dhidden else None,
        call.table if with_dtable else None,
    )
    in_specs = (call.hidden, call.table, tokens, tokens)
    return call.map(shard, in_specs, out_specs)(hidden, table, targets, weights)


def _walk(
    call: _Call,
    hidden_BTD,
    table_VD,
    targets_BT,
    weights_BT=None,
    *,
    with_predictions: bool = False,
    with_dhidden: bool = False,
    with_dtable: bool = False,
):
    """Goes over the tokens of a device, tile by tile.

    Returns: (statistics, predictions) of every token, and the gradients of loss_sum for hidden and for the device's
      shard of the table; None for what is not asked for.
    """
    shape, dtype, vocab_axes = targets_BT.shape, hidden_BTD.dtype, call.vocab_axes
    table_VD = call.shards.gathered(table_VD.astype(dtype), call.table)
    first_id = jnp.int32(0)
    if vocab_axes:
        first_id = jax.lax.axis_index(vocab_axes) * table_VD.shape[0]
    ids_V = first_id + jnp.arange(table_VD.shape[0], dtype=jnp.int32)

    def of_tile(dtable_VD, tile):
        hidden_CD, targets_C, weights_C = tile
        with jax.named_scope("logits"):
            logits_CV = jnp.einsum("cd,vd->cv", hidden_CD, table_VD, preferred_element_type=jnp.float32)
        logits_CV = soft_capped(logits_CV, call.soft_cap)
        is_target_CV = ids_V == targets_C[:, None]
        statistics, greatest_C = _statistics(logits_CV, is_target_CV, vocab_axes, is_capped=call.soft_cap is not None)
        predictions_C = _predictions(logits_CV, greatest_C, first_id, vocab_axes) if with_predictions else None
        dhidden_CD = None
        with jax.named_scope(GRADIENT_SCOPE):
            if with_dhidden or with_dtable:
                dlogits_CV = _dlogits(call, logits_CV, is_target_CV, statistics, targets_C, weights_C).astype(dtype)
            with jax.named_scope("logits"):
                if with_dhidden:
                    dhidden_CD = jnp.einsum("cv,vd->cd", dlogits_CV, table_VD)
                if with_dtable:
                    dtable_VD = dtable_VD + jnp.einsum(
                        "cv,cd->vd", dlogits_CV, hidden_CD, preferred_element_type=jnp.float32
                    )
        return dtable_VD, (statistics, predictions_C, dhidden_CD)

    tiled, untiled = in_tiles(math.prod(shape), call.tile or default_tile(table_VD.shape[0]))
    weights_BT = jnp.ones(shape, jnp.float32) if weights_BT is None else weights_BT
    start = jnp.zeros(table_VD.shape, jnp.float32) if with_dtable else None
    dtable_VD, of_tiles = jax.lax.scan(of_tile, start, jax.tree.map(tiled, (hidden_BTD, targets_BT, weights_BT)))
    statistics, predictions, dhidden = jax.tree.map(lambda x: untiled(x).reshape(*shape, *x.shape[2:]), of_tiles)
    with jax.named_scope(GRADIENT_SCOPE):
        dhidden = None if dhidden is None else psum(dhidden, vocab_axes)
        dtable_VD = None if dtable_VD is None else call.shards.scattered(dtable_VD, call.table)
    return (statistics, predictions), dhidden, dtable_VD


def _statistics(
    logits_CV, is_target_CV, vocab_axes: tuple[str, ...], *, is_capped: bool
) -> tuple[_Statistics, jax.Array]:
    """Of each token, and its greatest logit."""
    # A kernel reads what is in memory, and capped logits are not: XLA caps them while it reads.
    greatest_C, sums_C = softmax_statistics(logits_CV, implementation="xla" if is_capped else None)
    if vocab_axes:
        here_C, greatest_C = greatest_C, jax.lax.pmax(greatest_C, vocab_axes)
        sums_C = sums_C * jnp.exp(here_C - greatest_C)
    # Compared instead of gathered: stays elementwise, and needs only a sum where the vocabulary is split.
    target_logits_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=1)
    if vocab_axes:
        sums_C, target_logits_C = psum(jnp.stack([sums_C, target_logits_C]), vocab_axes)
    log_normaliser_C = greatest_C + jnp.log(sums_C)
    return _Statistics(log_normaliser_C - target_logits_C, log_normaliser_C), greatest_C


def _predictions(logits_CV, greatest_C, first_id, vocab_axes: tuple[str, ...]) -> jax.Array:
    predictions_C = first_id + jnp.argmax(logits_CV, axis=1).astype(jnp.int32)
    if not vocab_axes:
        return predictions_C
    has_it_C = jnp.max(logits_CV, axis=1) == greatest_C
    return jax.lax.pmin(jnp.where(has_it_C, predictions_C, jnp.iinfo(jnp.int32).max), vocab_axes)


def _dlogits(call: _Call, logits_CV, is_target_CV, statistics: _Statistics, targets_C, weights_C) -> jax.Array:
    """The gradient of loss_sum for the logits before their soft cap; float32."""
    of_nll_C = jnp.where(_is_outside(targets_C, call.vocab_size), 0.0, weights_C)
    of_normaliser_C = of_nll_C + 2 * call.z_loss * weights_C * statistics.log_normaliser
    softmax_CV = jnp.exp(logits_CV - statistics.log_normaliser[:, None])
    dlogits_CV = of_normaliser_C[:, None] * softmax_CV - jnp.where(is_target_CV, of_nll_C[:, None], 0.0)
    if call.soft_cap is not None:
        dlogits_CV = dlogits_CV * (1 - jnp.square(logits_CV / call.soft_cap))
    return dlogits_CV


def _is_outside(targets, vocab_size: int) -> jax.Array:
    return (targets < 0) | (targets >= vocab_size)
