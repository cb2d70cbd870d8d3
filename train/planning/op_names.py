"""What JAX's names of operations say: `op_name` in the metadata of a compiled program's instructions.

The scopes in them are those of longctx and the trainer: `layer.NAME`, `mixer`, `mlp`, `embedding`, `logits`, `loss`,
`optimizer`, `context_parallel`, `gradient` for what a forward pass computes of the backward pass, and of
`pallas_kernels.dispatch`: `OP.IMPLEMENTATION`.
"""

import re

from longctx.fused_loss import GRADIENT_SCOPE

_WRAPPER = re.compile(r"(\w+)\((.*)\)")
_NO_SCOPE = re.compile(
    r"while|body|cond|branch_\d+_fun|eval_jaxpr|closed_call|shard_map|checkpoint|rematted_computation|_\w*|"
    r"(?!layer)[\w\-]+\.\d+|"  # a name that XLA made up
)
_LOOP_SLICE = re.compile(r"/body/(jit\(dynamic_\w+\)/\w+|dynamic_slice|dynamic_update_slice|squeeze|broadcast_in_dim)$")

_PARTS = ("embedding", "logits", "loss", "optimizer")
_LAYER = re.compile(r"[/(]layer\.(\w+)")
_MIXER = re.compile(r"jit\(.*?[/(]layer\.\w+.*?/mixer(?=/|$)")
_MERGED = re.compile(r"(?:^|(?<=/))\((.*)\)$")


def layer_of(op_name: str) -> str | None:
    """The name of the mixer of the layer that it is part of."""
    found = _LAYER.search(op_name)
    return found and found[1]


def is_whole(op_name: str) -> bool:
    """Whether it begins with the compiled function, as JAX writes it."""
    return op_name.startswith("jit(")


def mixer_of(op_name: str) -> str | None:
    """The path of the mixer that it is part of: "jit(step)/jvp()/layer.far/mixer" of ".../mixer/shard_map/mul"."""
    found = _MIXER.match(_first(op_name))
    return found and found[0]


def merged(op_name: str) -> list[str]:
    """Those that XLA merged as it combined operations, in their order: "a/b" and "a/c" of "a/(b:c)"."""
    found = _MERGED.search(op_name)
    return [op_name[: found.start()] + name for name in found[1].split(":")] if found else [op_name]


def part_of(op_name: str) -> str:
    """The part of the model that it belongs to: "NAME mixer", "mlp", "logits", ... or "other"."""
    layer = layer_of(op_name)
    if layer:
        return f"{layer} mixer" if "/mixer" in op_name else "mlp" if "/mlp" in op_name else f"{layer} other"
    return next((part for part in _PARTS if re.search(rf"\b{part}\b", op_name)), "other")


def phase_of(op_name: str) -> str:
    """forward, recompute, backward or update."""
    if "rematted_computation" in op_name:
        return "recompute"
    if is_backward(op_name):
        return "backward"
    return "forward" if is_forward(op_name) or layer_of(op_name) else "update"


def is_telling(op_name: str) -> bool:
    """Whether it says what is computed: some are only a name that XLA made up, or a loop's access to its arrays."""
    return "/" in op_name and not _LOOP_SLICE.search(op_name)


def is_forward(op_name: str) -> bool:
    """Whether JAX says that it is of the forward pass; of some of that it says nothing."""
    return "jvp(" in _first(op_name) and not is_backward(op_name)


def is_backward(op_name: str) -> bool:
    """Whether it is of the backward pass, recomputation included, also where the forward pass does its work."""
    return "transpose(" in _first(op_name) or f"/{GRADIENT_SCOPE}/" in _first(op_name)


def readable(op_name: str) -> str:
    """JAX's scopes and the primitive, without the control flow around them.

    "jit(step)/transpose(jvp())/while/body/checkpoint/layer.local/mlp/dot_general" becomes
    "gradient of layer.local mlp dot_general".
    """
    if "/" not in op_name:
        return op_name
    parts = _first(op_name).split("/")
    words, wrappers = [], set()
    # The first is the compiled function itself.
    for part in parts[parts[0].startswith("jit(") :]:
        while wrapped := _WRAPPER.fullmatch(part):
            wrappers.add(wrapped[1])
            part = wrapped[2]
        if not _NO_SCOPE.fullmatch(part) and part not in words[-1:]:
            words.append(part)
    if "rematted_computation" in parts:
        return " ".join(["recomputed", *words])
    return " ".join(["gradient of", *words] if "transpose" in wrappers else words)


def argument(op_name: str) -> str:
    """The name of a program's argument: "state.params.embedding" of "state.params['embedding']"."""
    return re.sub(r"[\[\]\\']+", ".", op_name).strip(".")


def _first(op_name: str) -> str:
    """The first that tells of those that XLA merged: "a/b/c" of "a/(b/c:d/e)", of "(x.1:a/b/c)" and of "a/b/c;d/e"."""
    names = merged(op_name.split(";")[0])
    return next((name for name in names if "/" in name), names[0])
