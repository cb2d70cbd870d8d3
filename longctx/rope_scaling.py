"""Rotary frequencies made slower, for contexts longer than those that a model was trained on."""

import abc
import dataclasses
import math
from typing import ClassVar

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(abc.ABC):
    """How the frequencies of rotary positions differ from theta ** (-2 i / H)."""

    kind: ClassVar[str]

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied with."""
        return 1.0

    @abc.abstractmethod
    def scaled(self, frequencies: Float[np.ndarray, " half"], *, theta: float) -> Float[np.ndarray, " half"]:
        """The frequencies in the place of theta ** (-2 i / H), radians a token, float64."""

    @classmethod
    def variants(cls) -> dict[str, type["RopeScaling"]]:
        """The kinds, for configs to name."""
        return {variant.kind: variant for variant in (LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRopeScaling(RopeScaling):
    """Every frequency divided by factor: position interpolation.

    Reference: Chen et al. 2023, Extending Context Window of Large Language Models via Positional Interpolation,
      arXiv:2306.15595, equation 4.
    """

    kind: ClassVar[str] = "linear"

    factor: float
    """Frequencies are divided by it: the new length of contexts by the old."""

    def __post_init__(self):
        _check_factor(self.factor)

    def scaled(self, frequencies, *, theta):
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling(RopeScaling):
    """Slow frequencies divided by factor, fast ones left, and in between a mean of both, as in Llama 3.1.

    With t = original_length f / (2 pi), the turns of frequency f in the old length,
    f' = (1 - s) f / factor + s f,  s = clip((t - low_turns) / (high_turns - low_turns), 0, 1)

    Reference: Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv:2407.21783; the formula is that of its code.
    """

    kind: ClassVar[str] = "llama3"

    factor: float
    """Slow frequencies are divided by it."""
    original_length: int
    """Tokens of the contexts before."""
    low_turns: float = 1.0
    """Pairs that turned at most so often in them are slow."""
    high_turns: float = 4.0
    """Pairs that turned at least so often in them are fast."""

    def __post_init__(self):
        _check_factor(self.factor)
        _check_length(self.original_length)
        _check_turns("low_turns", self.low_turns, "high_turns", self.high_turns)

    def scaled(self, frequencies, *, theta):
        turns = self.original_length * frequencies / (2 * np.pi)
        fast = np.clip((turns - self.low_turns) / (self.high_turns - self.low_turns), 0.0, 1.0)
        return (1 - fast) * frequencies / self.factor + fast * frequencies


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRopeScaling(RopeScaling):
    """Slow frequencies divided by factor, fast ones left, in between a ramp over the pairs; and longer q and k.

    f'_i = (1 - s_i) f_i / factor + s_i f_i,  s_i = 1 - clip((i - first) / (last - first), 0, 1)
    first, last = floor(pair(high_turns)), ceil(pair(low_turns)),  kept within 0 and H - 1
    pair(t) = H log(original_length / (2 pi t)) / (2 log theta), the pair that turned t times in the old length

    Reference: Peng et al. 2023, YaRN, arXiv:2309.00071, section 3.2 and equation 22; the rounding is that of its code.
    """

    kind: ClassVar[str] = "yarn"

    factor: float
    """Slow frequencies are divided by it: the new length of contexts by the old."""
    original_length: int
    """Tokens of the contexts before."""
    low_turns: float = 1.0
    """Pairs that turned at most so often in them are slow."""
    high_turns: float = 32.0
    """Pairs that turned at least so often in them are fast."""
    attention_factor: float | None = None
    """Rotated queries and keys are multiplied with it; null means 0.1 log(factor) + 1."""

    def __post_init__(self):
        _check_factor(self.factor)
        _check_length(self.original_length)
        _check_turns("low_turns", self.low_turns, "high_turns", self.high_turns)
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise ValueError(f"attention_factor: got {self.attention_factor}, wanted null or a number > 0")

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies, *, theta):
        half = len(frequencies)

        def pair(turns: float) -> float:
            return half * (math.log(self.original_length) - math.log(2 * math.pi * turns)) / math.log(theta)

        first = max(math.floor(pair(self.high_turns)), 0)
        last = min(math.ceil(pair(self.low_turns)), 2 * half - 1)
        slow = np.clip((np.arange(half) - first) / (last - first if last != first else 0.001), 0.0, 1.0)
        return slow * frequencies / self.factor + (1 - slow) * frequencies


def _check_factor(factor: float) -> None:
    if not factor >= 1:
        raise ValueError(f"factor: got {factor}, wanted a number >= 1, the new length of contexts by the old")


def _check_length(original_length: int) -> None:
    if original_length < 1:
        raise ValueError(f"original_length: got {original_length}, wanted a number of tokens >= 1")


def _check_turns(low_name: str, low: float, high_name: str, high: float) -> None:
    if not 0 < low < high:
        raise ValueError(f"{low_name}: got {low} with {high_name}={high}, wanted 0 < {low_name} < {high_name}")
