"""Compiling many programs side by side."""

import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax


def compile_all[K: Hashable](
    programs: Mapping[K, Callable[[], jax.stages.Lowered]], *, progress: Callable[[str], None]
) -> dict[K, jax.stages.Compiled | Exception]:
    """Compiles programs in threads; what one raises takes its place.

    Tracing and lowering is Python and holds its lock, so it goes on in this thread while others compile.

    Args:
      programs: Functions that trace and lower a program, by its key.
      progress: Is told how far it is.
    """
    outcomes: dict[K, jax.stages.Compiled | Exception] = {}
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        compiling = {}
        for number, (key, lower) in enumerate(programs.items(), start=1):
            try:
                compiling[key] = pool.submit(lower().compile)
            except Exception as error:  # another library's raises what it likes
                outcomes[key] = error
            if number % 10 == 0 or number == len(programs):
                progress(f"traced {number} of {len(programs)} programs")
        for key, future in compiling.items():
            outcomes[key] = future.exception() or future.result()
    return outcomes
