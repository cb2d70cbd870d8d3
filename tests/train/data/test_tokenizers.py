"""Tokenizers: text comes back, ids stay in the vocabulary, broken files say so."""

import sys

import numpy as np
import pytest

from train.data import DataError, open_tokenizer


def save_tokenizer(path, special_tokens=("<pad>", "<|endoftext|>")):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the cat"] * 4, trainer)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return path


TEXTS = ["the cat sat on the mat", "", "a\r\nb\0c", "\u00e9\u20ac\U0001f600", "x" * 1000]


@pytest.mark.parametrize("kind", ["bytes", "hf"])
def test_text_comes_back(kind, tmp_path):
    name = "bytes" if kind == "bytes" else str(save_tokenizer(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(name)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        np.testing.assert_array_equal(tokenizer.encode(text), ids)
        assert ids.dtype == np.int32
        assert not len(ids) or 0 <= ids.min() and ids.max() < tokenizer.vocab_size
        assert tokenizer.end_id not in ids


def test_bytes_decode_whatever_a_model_says():
    tokenizer = open_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
    assert tokenizer.decode([104, 256, 300, -1, 105]) == "hi"
    assert tokenizer.decode([0xC3, 104]) == "\ufffdh"


def test_a_tokenizer_json_decodes_whatever_a_model_says(tmp_path):
    tokenizer = open_tokenizer(str(save_tokenizer(tmp_path / "tokenizer.json")))
    ids = tokenizer.encode("the cat").tolist()
    assert tokenizer.decode([*ids, tokenizer.end_id, tokenizer.vocab_size + 5]) == "the cat"


def test_truncation_and_padding_of_the_file_are_put_aside(tmp_path):
    tokenizer = open_tokenizer(str(save_tokenizer(tmp_path / "tokenizer.json")))
    short, long = tokenizer.encode_batch(["cat", "cat dog " * 20])
    assert len(short) < 8 < len(long)


def test_a_folder_stands_for_its_tokenizer_json(tmp_path):
    path = save_tokenizer(tmp_path / "tokenizer.json")
    assert open_tokenizer(str(tmp_path)).fingerprint == open_tokenizer(str(path)).fingerprint


def test_a_text_that_spells_the_end_token_does_not_end(tmp_path):
    tokenizer = open_tokenizer(str(save_tokenizer(tmp_path / "tokenizer.json")))
    assert tokenizer.end_id not in tokenizer.encode("the<|endoftext|>cat")


def test_fingerprints_tell_tokenizers_apart(tmp_path):
    one = str(save_tokenizer(tmp_path / "one.json", ["<|endoftext|>", "<eos>"]))
    other = str(save_tokenizer(tmp_path / "other.json", ["<eos>"]))
    prints = [open_tokenizer(name).fingerprint for name in ("bytes", "ids:10", "ids:11", one, other)]
    prints.append(open_tokenizer(one, end_token="<eos>").fingerprint)
    assert len(set(prints)) == len(prints)


def test_the_end_token_can_be_named(tmp_path):
    path = str(save_tokenizer(tmp_path / "tokenizer.json", ["<stop>"]))
    with pytest.raises(
        DataError, match=r"holds no end-of-document token: wanted one of <\|endoftext\|>.*data.end_token"
    ):
        open_tokenizer(path)
    with pytest.raises(DataError, match=r"holds no end-of-document token: wanted '<halt>'"):
        open_tokenizer(path, end_token="<halt>")
    assert open_tokenizer(path, end_token="<stop>").end_id == 0


def test_bare_ids():
    tokenizer = open_tokenizer("ids:1000")
    assert (tokenizer.vocab_size, tokenizer.end_id) == (1000, 999)
    assert tokenizer.decode(tokenizer.encode("3 998 0")) == "3 998 0"
    for text in ("import os", "999", "-1"):
        with pytest.raises(DataError, match="wanted ids from 0 to 998 separated by blanks; use 'bytes' or"):
            tokenizer.encode(text)


def test_a_missing_tokenizer_file_says_so(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match=r"data.tokenizer='.*none.json' cannot be read: No such file.*wanted 'bytes'"):
        open_tokenizer(str(tmp_path / "none.json"))


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"model": 3}', b"\xff\xfe", b"[]"])
def test_a_broken_tokenizer_file_says_so_on_one_line(tmp_path, content):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is not a tokenizer.json \(.*\); save it again") as error:
        open_tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"needs the tokenizers package; install 'longctx-jax\[hf\]'"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))
