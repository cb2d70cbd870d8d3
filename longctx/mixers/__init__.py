"""Sequence-mixing mechanisms, one file each; every module of this folder is imported, so that it can register."""

import importlib
import pkgutil

from longctx.mixers.registry import MixerConfig, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["MixerConfig", "register"]
