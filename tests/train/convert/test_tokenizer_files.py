"""Which special ids go with a model, and where its tokenizer is looked for."""

import json

import pytest
import tokenizers

from train.convert.tokenizer_files import special_ids, tokenizer_folder
from train.schema import ConfigError


@pytest.fixture
def folder(tmp_path):
    words = {"a": 0, "b": 1, "</s>": 2, "<end>": 3}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_the_end_token_of_the_run(folder):
    assert special_ids(None, None) == {}
    assert special_ids("bytes", None) == {"eos_token_id": 256}
    assert special_ids("ids:64", None) == {"eos_token_id": 63}
    assert special_ids(str(folder), None) == {"eos_token_id": 2}
    assert special_ids(str(folder / "tokenizer.json"), "<end>") == {"eos_token_id": 3}


def test_what_the_model_said_of_generation_goes_first(folder):
    content = {"bos_token_id": 0, "eos_token_id": [2, 3], "pad_token_id": None, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(content))
    assert special_ids(str(folder), None) == {"bos_token_id": 0, "eos_token_id": [2, 3]}


def test_a_tokenizer_that_is_not_there(folder, tmp_path):
    assert tokenizer_folder("bytes") is tokenizer_folder("ids:64") is None
    assert tokenizer_folder(str(folder)) == tokenizer_folder(str(folder / "tokenizer.json")) == folder
    with pytest.raises(ConfigError, match=r"data.tokenizer: got .*/no, wanted a tokenizer.json that is there, or its"):
        tokenizer_folder(str(tmp_path / "no"))
    with pytest.raises(ConfigError, match=r"--tokenizer: .*holds no end-of-document token: wanted '<stop>'"):
        special_ids(str(folder), "<stop>")
