"""The files of a Hugging Face tokenizer, which go with a model as they are."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.convert.config_json import read_json
from train.data import DataError, open_tokenizer
from train.schema import ConfigError

GENERATION = "generation_config.json"
_TOKENIZER = "tokenizer.json"
_FILES = (
    _TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", GENERATION,
)  # fmt: skip
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copies the tokenizer of a folder, with how to generate; whether there is one.

    Args:
      source: A folder that may hold a tokenizer.json.
      target: The folder to put its files into; made where there is a tokenizer.
    """
    if not (source / _TOKENIZER).is_file():
        return False
    target.mkdir(exist_ok=True)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return True


def tokenizer_folder(name: str) -> Path | None:
    """The folder of the tokenizer that `data.tokenizer` names; None for one that is no file.

    Raises: ConfigError where it is not there.
    """
    if name == "bytes" or name.startswith("ids:"):
        return None
    path = Path(name)
    file = path / _TOKENIZER if path.is_dir() else path
    if file.name != _TOKENIZER or not file.is_file():
        raise ConfigError(
            f"data.tokenizer: got {name}, wanted a {_TOKENIZER} that is there, or its folder; say where it is now with "
            "--tokenizer, or --tokenizer none"
        )
    return file.parent


def special_ids(name: str | None, end_token: str | None) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, as far as the tokenizer's files, or its end token, say.

    Args:
      name: As `data.tokenizer`; None where there is none.
      end_token: As `data.end_token`.
    """
    if name is None:
        return {}
    folder = tokenizer_folder(name)
    if folder is not None and (folder / GENERATION).is_file():
        if found := given_ids(read_json(folder / GENERATION)):
            return found
    try:
        return {"eos_token_id": open_tokenizer(name, end_token=end_token).end_id}
    except DataError as error:
        raise ConfigError(f"--tokenizer: {error}") from error


def given_ids(content: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the special ids that a config.json or generation_config.json gives."""
    return {key: content[key] for key in _SPECIAL_IDS if content.get(key) is not None}


def write_generation(folder: Path, ids: dict[str, Any]) -> None:
    """Writes generation_config.json, unless it was copied or there is nothing for it to say."""
    if ids and not (folder / GENERATION).is_file():
        (folder / GENERATION).write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
