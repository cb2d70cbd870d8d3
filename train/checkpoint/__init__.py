"""Checkpoints: saving, resuming and initializing (store.py), and looking at them without a run (inspection.py)."""

from train.checkpoint.store import (
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    Position,
    changed_settings,
    find_checkpoint,
    load_params,
    load_position,
    save_params,
    tell_faults_once,
)

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Checkpoints",
    "Position",
    "changed_settings",
    "find_checkpoint",
    "load_params",
    "load_position",
    "save_params",
    "tell_faults_once",
]
