"""Settings of the data pipeline."""

from dataclasses import dataclass
from typing import Literal

from train.data.sources import SourceConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how documents become rows."""

    seq_len: int
    """Number of tokens in a row."""

    sources: tuple[SourceConfig, ...]
    """Where the documents come from. The rows of several sources are mixed by their weights."""

    tokenizer: str = "bytes"
    """How text becomes ids: "bytes", the path of a Hugging Face tokenizer.json, or "ids:N" for sources that
    hold ids below N in place of text."""

    end_token: str | None = None
    """Token of the tokenizer.json that stands between documents. Default: a common one, such as
    "<|endoftext|>"."""

    cache_dir: str = "~/.cache/longctx"
    """Folder that keeps tokenised sources. Its content may be deleted between runs."""

    held_out_fraction: float = 0.02
    """Share of each source's documents held out of training, to evaluate on. 0 holds out nothing. Where
    `held_out_sources` are given, they take its place."""

    held_out_sources: tuple[SourceConfig, ...] = ()
    """Sources to evaluate on, all of them; `sources` are then trained on whole."""

    long_documents: Literal["split", "drop"] = "split"
    """What becomes of a document longer than a row. "split" cuts it into pieces; "drop" leaves it out, and
    the number of those is reported."""

    max_document_length: int | None = None
    """Most slots of a row that a document takes; null means all. A longer one is treated as `long_documents` says of
    one that is longer than a row. Attention within documents then reaches no farther, and context parallelism may send
    less."""

    num_threads: int = 2
    """Threads that prepare batches ahead of training. 0 prepares each when it is asked for."""

    prefetch_batches: int = 4
    """Batches prepared ahead of training, at least one a thread."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"seq_len: got {self.seq_len}, wanted >= 2; the shortest document fills two slots")
        if not self.sources:
            raise ValueError("sources: got none, wanted at least one; add one, such as {kind: stdlib}")
        for source in self.held_out_sources:
            if source.weight != 1.0:
                raise ValueError(
                    f"held_out_sources: got weight={source.weight} ({source.kind}), wanted none; leave it "
                    "out, each is evaluated whole"
                )
        if self.max_document_length is not None and not 2 <= self.max_document_length <= self.seq_len:
            raise ValueError(
                f"max_document_length: got {self.max_document_length}, wanted null or 2 to seq_len={self.seq_len}; the "
                "shortest document fills two slots"
            )
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(
                f"held_out_fraction: got {self.held_out_fraction}, wanted 0 <= fraction < 1; 0 holds "
                "out nothing, to evaluate on nothing"
            )
        if self.tokenizer.startswith("ids:"):
            count = self.tokenizer.removeprefix("ids:")
            if not (count.isascii() and count.isdigit() and len(count) < 11 and 2 <= int(count) <= 2**31):
                raise ValueError(
                    f"tokenizer: got {self.tokenizer[:40]!r}, wanted 'ids:N' with 2 <= N <= 2^31, such as 'ids:32768'; "
                    "count the end id N - 1 that stands between documents"
                )
        if self.end_token is not None and (self.tokenizer == "bytes" or self.tokenizer.startswith("ids:")):
            raise ValueError(
                f"end_token: got {self.end_token!r} with tokenizer={self.tokenizer!r}, wanted none with a "
                "tokenizer that has its own end id; leave end_token out"
            )
        if self.num_threads < 0:
            raise ValueError(f"num_threads: got {self.num_threads}, wanted >= 0; 0 uses no thread")
        if self.prefetch_batches < max(self.num_threads, 1):
            raise ValueError(
                f"prefetch_batches: got {self.prefetch_batches}, wanted >= 1 and >= "
                f"num_threads={self.num_threads}; raise it or lower num_threads"
            )
