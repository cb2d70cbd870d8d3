"""Helpers of the data tests."""

import pytest

from train.data import DataConfig, open_data


@pytest.fixture
def open_sources(tmp_path):
    """Opens the data of some sources with a cache of its own."""

    def open_sources(*sources, seed=0, **settings):
        settings = {"seq_len": 32, "held_out_fraction": 0.0, "cache_dir": str(tmp_path / "cache"), **settings}
        return open_data(DataConfig(sources=sources, **settings), seed=seed)

    return open_sources


@pytest.fixture
def documents():
    """The documents of a corpus as text, bytes being the tokenizer; taken from the rows, so cut rows are no
    good."""

    def documents(data, num_rows):
        texts = []
        for index in range(num_rows):
            row = data.train[index]
            for segment in range(row["segment_ids"].max() + 1):
                texts.append(data.tokenizer.decode(row["targets"][row["segment_ids"] == segment]))
        return sorted(texts)

    return documents
