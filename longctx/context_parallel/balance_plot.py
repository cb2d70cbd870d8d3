"""A picture of the work of devices, hop by hop. Needs matplotlib."""

from typing import Any


def plot(work: Any, *, ax: Any) -> Any:
    """`Work.plot`, which documents the arguments."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Work.plot: matplotlib is not installed, wanted for drawing; pip install 'longctx-jax[plot]'"
        ) from error
    if ax is None:
        _, ax = pyplot.subplots(layout="constrained")
    image = ax.imshow(work.areas, cmap="Blues", vmin=0, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label="pairs")
    ax.set(xlabel="hop", ylabel="device")
    ax.set_title(
        f"busiest device {work.imbalance:.2f} of the mean, slowest of every hop {work.critical_path:.2f}",
        fontsize="small",
    )
    return ax
