"""The memory of a training step by formula: which part takes how much, before anything is compiled."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx.context_parallel import AttentionSharding
from longctx.fused_loss import default_tile
from longctx.mixers.registry import MixerConfig
from longctx.model import ModelConfig
from longctx.remat import ATTENTION, MIXER_OUTPUT, MLP_HIDDEN, QKV, RESIDUAL, kept, offloaded
from longctx.sharding import ACTIVATION_AXES, CONTEXT_AXES, PARAMETER_AXES
from train.planning.cost import held_bytes
from train.state import TrainState, is_on_host, trained

_BATCH_BYTES_OF_TOKEN = 5 * 4  # tokens, targets, positions, segment_ids: int32; loss_weights: float32
_BATCH_BYTES_OF_ROW = 4  # num_bytes: float32
_RING = AttentionSharding()


def parameter_count(params: Any) -> int:
    """Values of all parameters, each counted once, however many devices hold it."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def memory_by_formula(
    model: ModelConfig,
    state: TrainState,
    *,
    mesh_sizes: Mapping[str, int],
    rows: int,
    seq_len: int,
    accumulate_steps: int = 1,
    loss: str = "fused",
    loss_tile: int | None = None,
    sharding: AttentionSharding = _RING,
) -> dict[str, int]:
    """Bytes that each part of a training step takes on one device; `peak_bytes` adds up those held at once.

    Parameters, optimizer and batch are exact. The others estimate what XLA makes of the step: the functions below give
    the reasons. They were held against the `peak_memory_in_bytes` of programs compiled for TPU v5e, which is what its
    compiler refuses a program by; the `temp_size_in_bytes` it reports is up to half as much again.

    Args:
      model: Of this state.
      state: Abstract, with shardings, from `train.state.abstract_state`.
      mesh_sizes: Devices on each axis of the mesh.
      rows: Rows of a microbatch, over all devices.
      seq_len: Tokens of a row.
      accumulate_steps: Microbatches of a step.
      loss, loss_tile: As of TrainingConfig.
      sharding: How layers are split where their tokens are.
    """
    shard = _shard(model, state, mesh_sizes, rows, seq_len)
    layers = _layers(model, state.params)
    return {
        "parameters": _held_bytes(state.params),
        "optimizer": _held_bytes(state.opt_state),
        # Their sum over the microbatches is held beside those of the one at hand.
        "gradients": min(accumulate_steps, 2) * _held_bytes(trained(state.params), "float32"),
        "batch": accumulate_steps * (_BATCH_BYTES_OF_TOKEN * shard.tokens + _BATCH_BYTES_OF_ROW * shard.rows),
        "saved activations": shard.tokens * sum(layer.count * _saved(model, layer, shard) for layer in layers),
        "layer at work": _layer_at_work(model, state.params, layers, shard, mesh_sizes),
        "logits": _fused_loss(model, state.params, shard, loss_tile)
        if loss == "fused"
        else _logits(model, state.params, shard),
        "context parallelism": _context_parallelism(model, shard, mesh_sizes, sharding),
    }


def host_memory_by_formula(
    model: ModelConfig, state: TrainState, *, mesh_sizes: Mapping[str, int], rows: int, seq_len: int
) -> dict[str, int]:
    """Bytes of the host's memory that one device holds tensors in, by class; args as of `memory_by_formula`."""
    shard = _shard(model, state, mesh_sizes, rows, seq_len)
    of_token = 0
    for layer in _layers(model, state.params):
        sizes = _bytes_by_name(model, layer, shard)
        of_token += layer.count * sum(sizes[name] for name in offloaded(model.remat))
    return {"activations": shard.tokens * of_token, "optimizer": _held_bytes(state.opt_state, on_host=True)}


def peak_bytes(parts: Mapping[str, int]) -> int:
    """The most that one device holds at once, of the parts that `memory_by_formula` gives.

    The backward pass begins at the logits, which are gone by the time a layer is at work.
    """
    at_work, logits = parts["layer at work"] + parts["context parallelism"], parts["logits"]
    return sum(parts.values()) - min(at_work, logits)


class _Shard(NamedTuple):
    """What one device has of a microbatch's rows and of their length, and of the dims that are split."""

    rows: int
    length: int
    mlp_dim: int
    vocab_size: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def _shard(model: ModelConfig, state: TrainState, mesh_sizes: Mapping[str, int], rows: int, seq_len: int) -> _Shard:
    return _Shard(
        rows=_part(rows, "batch", mesh_sizes),
        length=_part(seq_len, "sequence", mesh_sizes),
        mlp_dim=_part(model.mlp_dim, "mlp", mesh_sizes),
        vocab_size=_part(state.params["embedding"].shape[0], "vocab", mesh_sizes),
    )


def _part(size: int, logical_axis: str, mesh_sizes: Mapping[str, int]) -> int:
    """What one device has of a dim: by the rule of longctx.sharding, the longest prefix of its axes that divides it."""
    axes = ACTIVATION_AXES[logical_axis]
    while size % math.prod(mesh_sizes[axis] for axis in axes):
        axes = axes[:-1]
    return size // math.prod(mesh_sizes[axis] for axis in axes)


class _Layer(NamedTuple):
    """A layer on one device, its parameters gathered over all axes but tensor.

    Attributes:
      count: Layers of this form: all periods, or 1.
      num_values: Values of its parameters.
      mixer_inside: Values a token between the mixer's matrices: what those from the model dim put out, and what those
        back to it take in.
      mixer_outputs: Values a token that the mixer's matrices put out.
    """

    count: int
    num_values: int
    mixer_inside: int
    mixer_outputs: int


def _layers(model: ModelConfig, params: Any) -> list[_Layer]:
    """One for each place in the pattern, then one for each layer before and after its repetitions."""
    periods, leading, remainder = (params.get(name, {}).values() for name in ("periods", "leading", "remainder"))
    return [_layer(model, layer, count=model.num_periods, is_stacked=True) for layer in periods] + [
        _layer(model, layer, count=1, is_stacked=False) for layer in (*leading, *remainder)
    ]


def _layer(model: ModelConfig, layer: Any, *, count: int, is_stacked: bool) -> _Layer:
    inside = outputs = 0
    for leaf in jax.tree.leaves(layer["mixer"]):
        shape = leaf.shape[is_stacked:]
        if len(shape) >= 2 and model.dim in (shape[0], shape[-1]):
            width = _gathered_size(leaf) // count // model.dim
            inside += width
            outputs += width if shape[0] == model.dim else model.dim
    num_values = sum(_gathered_size(leaf) for leaf in jax.tree.leaves(layer)) // count
    return _Layer(count=count, num_values=num_values, mixer_inside=inside, mixer_outputs=outputs)


def _saved(model: ModelConfig, layer: _Layer, shard: _Shard) -> int:
    """Bytes a token that the forward pass keeps of one layer, by what the backward pass recomputes."""
    keeps_mlp = model.mlp_tile is None  # by tiles it keeps its input alone, whatever the rest keeps
    match model.remat:
        case "full":  # The layer's input.
            return _itemsize(model) * model.dim
        case "dots":  # Beside it what the matmuls put out, but for the MLP's last, on which no gradient depends.
            return _itemsize(model) * (model.dim + layer.mixer_outputs + (2 * shard.mlp_dim if keeps_mlp else 0))
        case "none" if not model.scan_layers:  # What goes into matmuls and attention, and what the norms read.
            of_mlp = 2 * shard.mlp_dim if keeps_mlp else 0
            return _itemsize(model) * (layer.mixer_inside + of_mlp + 4 * model.dim)
        case "none":  # In a loop JAX keeps float32 copies too; the layer's input is one of the first norm's.
            of_mlp = 4 * shard.mlp_dim if keeps_mlp else 0
            return _activations(model, layer, shard, num_norms=2) - _itemsize(model) * of_mlp
    names = kept(model.remat, "save")
    if RESIDUAL not in (*names, *offloaded(model.remat)):
        names = (RESIDUAL, *names)
    sizes = _bytes_by_name(model, layer, shard)
    return sum(sizes[name] for name in names)


def _bytes_by_name(model: ModelConfig, layer: _Layer, shard: _Shard) -> dict[str, int]:
    """Bytes a token of the tensors of `longctx.remat.NAMES`, statistics such as lse left out."""
    before_op = layer.mixer_outputs - model.dim
    values = {
        RESIDUAL: model.dim,
        QKV: before_op,
        ATTENTION: layer.mixer_inside - before_op,
        MIXER_OUTPUT: model.dim,
        MLP_HIDDEN: 2 * shard.mlp_dim,
    }
    return {name: _itemsize(model) * count for name, count in values.items()}


def _activations(model: ModelConfig, layer: _Layer, shard: _Shard, *, num_norms: int) -> int:
    """Bytes a token of all that one layer computes and its gradients depend on.

    In the compute dtype: the mixer's values between its matrices; six of the MLP's hidden dim (gate, up, three of the
    silu, the product), unless it is computed by tiles; what both norms put out. In float32: two copies of the residual
    a norm.
    """
    of_mlp = 6 * shard.mlp_dim if model.mlp_tile is None else 0
    in_compute_dtype = layer.mixer_inside + of_mlp + 2 * model.dim
    return _itemsize(model) * in_compute_dtype + 4 * num_norms * 2 * model.dim


def _layer_at_work(
    model: ModelConfig, params: Any, layers: list[_Layer], shard: _Shard, mesh_sizes: Mapping[str, int]
) -> int:
    """What the backward pass of one layer holds beside what was saved.

    Activations: the recomputed ones or, in the place of saved ones, their cotangents. The two norms are not at work at
    once, so one's float32 copies count. Parameters, in the compute dtype: the shards of all layers, since XLA casts
    them before the loop over the periods; and those of one period gathered, since XLA gathers ahead. Gradients of
    parameters are scattered while they are computed, so none is held in full.
    """
    cast = gathered = 0
    if model.dtype != model.param_dtype:
        cast = _held_bytes([params.get(name) for name in ("leading", "periods", "remainder")], model.dtype)
    if math.prod(mesh_sizes[axis] for axis in PARAMETER_AXES["embed"]) > 1:
        period = sum(layer.num_values for layer in layers[: len(params.get("periods", ()))])
        gathered = _itemsize(model) * max(period, *(layer.num_values for layer in layers))
    activations = shard.tokens * max(_activations(model, layer, shard, num_norms=1) for layer in layers)
    return activations + _mlp_tile(model, shard) + cast + gathered


def _mlp_tile(model: ModelConfig, shard: _Shard) -> int:
    """Of one tile of the MLP what `_activations` counts of all tokens, and in float32 the gradients of its matrices."""
    if model.mlp_tile is None:
        return 0
    tile = min(shard.tokens, model.mlp_tile)
    return _itemsize(model) * 6 * tile * shard.mlp_dim + 4 * 3 * model.dim * shard.mlp_dim


def _logits(model: ModelConfig, params: Any, shard: _Shard) -> int:
    """Float32 logits; in the compute dtype their cotangent, and the table gathered."""
    gathered = _gathered_size(_output_table(model, params))
    return (4 + _itemsize(model)) * shard.tokens * shard.vocab_size + _itemsize(model) * gathered


def _fused_loss(model: ModelConfig, params: Any, shard: _Shard, tile: int | None) -> int:
    """Of one tile what `_logits` counts of all tokens; the gradient of the final hidden states; and where the table is
    gathered, its gradient in float32 until it is scattered."""
    table = _output_table(model, params)
    gathered = _gathered_size(table)
    tile = min(shard.tokens, tile or default_tile(shard.vocab_size))
    dtable = 4 * gathered if gathered > math.prod(table.sharding.shard_shape(table.shape)) else 0
    in_compute_dtype = tile * shard.vocab_size + gathered + shard.tokens * model.dim
    return 4 * tile * shard.vocab_size + _itemsize(model) * in_compute_dtype + dtable


def _output_table(model: ModelConfig, params: Any) -> jax.ShapeDtypeStruct:
    return params["embedding" if model.tie_embeddings else "unembedding"]


def _context_parallelism(
    model: ModelConfig, shard: _Shard, mesh_sizes: Mapping[str, int], sharding: AttentionSharding
) -> int:
    """What is sent twice: of a ring keys and values at work and on their way, of a gather as it arrives and in order;
    and so their gradients. For each distinct mask the positions and segment ids of all keys, at most."""
    degree = math.prod(mesh_sizes[axis] for axis in CONTEXT_AXES)
    if degree == 1:
        return 0

    def buffers(mixer: MixerConfig) -> int:
        transfers = mixer.transfers(
            model.dim,
            rows=shard.rows,
            seq_len=shard.length * degree,
            heads_split=mesh_sizes["tensor"],
            ring_size=degree,
            sharding=sharding,
            dtype=model.dtype,
        )
        return held_bytes(transfers)

    masks = {mixer.mask for mixer in model.mixers.values()} - {None}
    return max(map(buffers, model.mixers.values())) + len(masks) * 8 * shard.tokens * degree


def _itemsize(model: ModelConfig) -> int:
    """Bytes of a value in the compute dtype."""
    return jnp.dtype(model.dtype).itemsize


def _held_bytes(tree: Any, dtype: str | None = None, *, on_host: bool = False) -> int:
    """Bytes of one device's shards of all arrays in its memory, or the host's, as they are or cast to `dtype`."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(dtype or leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        if is_on_host(leaf) == on_host
    )


def _gathered_size(leaf: jax.ShapeDtypeStruct) -> int:
    """Values of a parameter on one device once it is gathered over all axes but tensor."""
    is_split = any("tensor" in axes for axes in leaf.sharding.spec if axes)
    return leaf.size // leaf.sharding.mesh.shape["tensor"] if is_split else leaf.size
