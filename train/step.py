"""One optimizer step as one jitted function over split state."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from longctx.fused_loss import fused_cross_entropy
from longctx.losses import LossSums, cross_entropy
from longctx.sharding import batch_sharding
from train.optimizer import Schedule
from train.spikes import SpikeConfig
from train.state import TrainState, float32, frozen, together, trained

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class NonFiniteError(RuntimeError):
    """A loss or a gradient that is not finite stopped the run."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, on how many rows a step, and what to do with a step that went wrong."""

    steps: int
    """Optimizer steps of the whole run; raise it to continue a finished run."""
    batch_size: int
    """Rows of data.seq_len tokens in a step, over all devices and microbatches."""
    accumulate_steps: int = 1
    """Microbatches that a step is cut into; their gradient sums are added in float32 before one update."""
    z_loss: float = 0.0
    """Weight of the penalty on the squared log-normalizer of the logits; 0 switches it off."""
    loss: Literal["fused", "plain"] = "fused"
    """How the loss is computed. `fused`: a tile of tokens at a time, with its gradient, so that the logits of all
    tokens are never held. `plain`: from all logits, float32. The same but for the order of sums, and that `fused` adds
    up the gradient of the output projection in float32."""
    loss_tile: int | None = None
    """Tokens of a tile of the fused loss on each device; null takes 4096, or as many as have 2 GiB of logits."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """What a non-finite loss or gradient does: stop the run, skip and count the step, or rewind as `spikes.action` can.
    Never is it applied."""
    spikes: SpikeConfig = dataclasses.field(default_factory=SpikeConfig)
    """Losses far above the recent ones."""
    max_repeats: int = 10
    """Most steps in a row that are skipped, and most times that the run goes back to one checkpoint, before it
    stops."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate_steps", "max_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 1 or more")
        if self.loss_tile is not None and self.loss_tile < 1:
            raise ValueError(f"loss_tile: got {self.loss_tile}, wanted null or a number of tokens >= 1")
        if self.loss_tile is not None and self.loss != "fused":
            raise ValueError(f"loss_tile: got {self.loss_tile} with loss={self.loss}, which has no tiles; leave it out")
        if self.z_loss < 0:
            raise ValueError(f"z_loss: got {self.z_loss}, wanted 0 or more")
        if self.batch_size % self.accumulate_steps:
            raise ValueError(
                f"accumulate_steps: got {self.accumulate_steps}, which does not divide batch_size={self.batch_size}; "
                "choose a divisor"
            )

    @property
    def rewinds(self) -> bool:
        """Whether the run may go back to a checkpoint."""
        return "rewind" in (self.on_nonfinite, self.spikes.action)


def bits_per_byte(nll_sum, num_bytes):
    """nats / (ln 2 x source bytes)."""
    return nll_sum / (math.log(2.0) * num_bytes)


def make_train_step(
    graphdef: nnx.GraphDef,
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: TrainingConfig,
    mesh: Mesh | AbstractMesh,
    *,
    is_stochastic: bool = False,
    deterministic: bool = False,
    offloads: bool = False,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the jitted step; the state passed to it is donated.

    The gradient is that of sum(weight x loss) / sum(weight) over the whole batch: microbatches add gradients
    of sums in float32, and one division by the total weight follows, so how the batch is cut does not change
    the update. The optimizer works in float32 whatever the dtype of the parameters. Where the model has adapters they
    alone have gradients and are updated. Optimizer state that lies in the host's memory comes to the device for the
    update.

    Args:
      graphdef: Static half of the model; it is merged with the parameters only while tracing.
      abstract: The state's shapes and shardings, from abstract_state; the new state has the same, and the gradients
        are laid out like the parameters.
      optimizer: As make_optimizer builds it.
      schedule: Learning rate by number of updates, for the metrics.
      config: Accumulation, the loss.
      mesh: Where the batch lies.
      is_stochastic: Whether the model draws random numbers, for dropout: then its call is given a key for each row,
        `rngs`, which follows from the state's key, the number of the step and the row. So neither the mesh, nor how
        the batch is cut, nor a resume changes what is drawn.
      deterministic: Whether XLA must compile for the same bits each time, where it would not in any case: on GPUs.
      offloads: Whether the step moves arrays to the host and back, which shall run beside compute.
    Returns: step(state, batch, stop=None, loss_limit=None, host_seconds=None) -> (state, metrics). Metrics are
      scalars: loss (mean nll in nats a token), bits_per_byte, z_loss (when on), grad_norm (before clipping),
      learning_rate, tokens (total weight), finite, skipped_steps. Where `stop` is given (bool [devices]) also stop:
      whether any of it is true, by which processes agree. Where `loss_limit` is (float32 []), spike: whether the loss
      is above it. Where `host_seconds` is (float32 [devices]), its maximum, whose place that is, and its mean:
      slowest_seconds, slowest_place, mean_seconds. A step that is not finite, or a spike that spikes.action does not
      let pass, leaves parameters and optimizer state as they were.
    Memory: a float32 copy of the gradients beside the state, sharded like the parameters that are trained.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    on_device = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), shardings.opt_state)

    def loss_sum(params, rest, microbatch):
        model = nnx.merge(graphdef, together(params, rest))
        source = {"rngs": microbatch["row_keys"]} if is_stochastic else {}
        of_tokens = {name: microbatch[name] for name in ("positions", "segment_ids")}
        sums = loss_sums(model, microbatch, config, **of_tokens, **source)
        return sums.loss_sum, (sums.loss_sum, sums.nll_sum, sums.weight_sum)

    def split(array):
        # Strided, so that every microbatch is spread over the same devices as the batch: no data moves.
        parts = array.reshape(-1, config.accumulate_steps, *array.shape[1:]).swapaxes(0, 1)
        spec = batch_sharding(mesh, array.ndim).spec
        return jax.lax.with_sharding_constraint(parts, PartitionSpec(None, *spec))

    def accumulate(params, rest, batch):
        layout = trained(shardings.params)

        def body(carry, microbatch):
            (_, sums), gradients = jax.value_and_grad(loss_sum, has_aux=True)(params, rest, microbatch)
            # Named, because nothing else ties the sums to the parameters' layout: each device keeps its shard only.
            gradients = jax.lax.with_sharding_constraint(float32(gradients), layout)
            return jax.tree.map(jnp.add, carry, (sums, gradients)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        zeros = jax.lax.with_sharding_constraint(zeros, layout)
        carry, _ = jax.lax.scan(body, ((jnp.float32(0.0),) * 3, zeros), {k: split(v) for k, v in batch.items()})
        return carry

    def step(
        state: TrainState,
        batch: Batch,
        stop: jax.Array | None = None,
        loss_limit: jax.Array | None = None,
        host_seconds: jax.Array | None = None,
    ) -> tuple[TrainState, Metrics]:
        if is_stochastic:
            batch = {**batch, "row_keys": _row_keys(state, len(batch["tokens"]))}
        params, rest = trained(state.params), frozen(state.params)
        (loss, nll, weight), gradients = accumulate(params, rest, batch)
        divisor = jnp.where(weight > 0, weight, 1.0)
        gradients = jax.tree.map(lambda g: g / divisor, gradients)
        grad_norm = optax.tree_utils.tree_norm(gradients)
        finite = applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if loss_limit is not None:
            is_spike = nll / divisor > loss_limit
            if config.spikes.action in ("skip", "rewind"):
                applied = finite & ~is_spike

        def keep_applied(new, old):
            return jnp.where(applied, new, old)

        with jax.named_scope("optimizer"):
            opt_state = jax.device_put(state.opt_state, on_device)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 counts with floats
                updates, new_opt_state = optimizer.update(gradients, opt_state, float32(params))
                learning_rate = schedule(state.step - state.skipped_steps)
            new_params = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)
            new_state = TrainState(
                step=state.step + 1,
                params=together(jax.tree.map(keep_applied, new_params, params), rest),
                opt_state=jax.tree.map(keep_applied, new_opt_state, opt_state),
                rng=state.rng,
                skipped_steps=state.skipped_steps + jnp.where(applied, 0, 1).astype(jnp.int32),
            )
        metrics = {
            "loss": nll / divisor,
            "bits_per_byte": bits_per_byte(nll, jnp.sum(batch["num_bytes"])),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": weight,
            "finite": finite,
            "skipped_steps": new_state.skipped_steps,
        }
        if config.z_loss:
            metrics["z_loss"] = (loss - nll) / divisor
        if stop is not None:
            metrics["stop"] = jnp.any(stop)
        if loss_limit is not None:
            metrics["spike"] = is_spike
        if host_seconds is not None:
            metrics |= {
                "slowest_seconds": jnp.max(host_seconds),
                "slowest_place": jnp.argmax(host_seconds),
                "mean_seconds": jnp.mean(host_seconds),
            }
        return new_state, metrics

    on_gpus = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "gpu"
    options = gpu_compiler_options(deterministic=deterministic, offloads=offloads) if on_gpus else {}
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def loss_sums(model: nnx.Module, batch: Batch, config: TrainingConfig, **of_tokens: Any) -> LossSums:
    """The loss of a batch by the config's way of computing it.

    Args:
      model: With `hidden`, `output_table` and `config.logits_soft_cap`, as TransformerLM has them; for the plain loss
        only called.
      of_tokens: What the model is called with beside the tokens.
    """
    targets, weights = batch["targets"], batch["loss_weights"]
    if config.loss == "plain":
        logits_BTV = model(batch["tokens"], **of_tokens)
        with jax.named_scope("loss"):
            return cross_entropy(logits_BTV, targets, weights, z_loss=config.z_loss)
    hidden_BTD = model.hidden(batch["tokens"], **of_tokens)
    with jax.named_scope("loss"):
        return fused_cross_entropy(
            hidden_BTD,
            model.output_table,
            targets,
            weights,
            z_loss=config.z_loss,
            soft_cap=model.config.logits_soft_cap,
            tile=config.loss_tile,
        )


def _row_keys(state: TrainState, num_rows: int) -> jax.Array:
    """A random key for each row of the step's batch, `[B]`."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    return jax.random.split(key, num_rows)


def gpu_compiler_options(*, deterministic: bool, offloads: bool = False) -> dict[str, str | bool]:
    """What XLA has to be told on GPUs.

    It keeps one collective in flight at a time there. A ring's backward pass has two at every hop, keys with values and
    their gradients, and the parameters of the next layer are on their way beside them. And it would fetch what a layer
    offloaded when the layer's backward pass begins, not one layer ahead.

    Args:
      deterministic: Whether to leave out operations whose sums have no fixed order, and the choice of an algorithm by
        timing, which may choose another in the next run.
      offloads: Whether the program copies to and from the host. XLA would record copies and kernels as CUDA graphs, in
        which they run one after the other; without graphs each launch costs the host some microseconds, which only
        small programs notice.
    """
    options: dict[str, str | bool] = {
        "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
        "xla_gpu_enable_pipelined_host_offloading": True,
    }
    if deterministic:
        options["xla_gpu_deterministic_ops"] = True
    if offloads:
        options["xla_gpu_enable_command_buffer"] = ""
    return options
