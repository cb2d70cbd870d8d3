"""Documents from files to batches: sources, tokenizers, a cache, packing and mixing.

The state of the data is one integer: the number of training rows consumed.
"""

from train.data.config import DataConfig
from train.data.errors import DataError
from train.data.pipeline import Data, open_data
from train.data.sources import SourceConfig, StdlibSource, SyntheticSource, TextSource, TokensSource
from train.data.task_sources import MqarSource, PasskeySource
from train.data.tokenizers import Tokenizer, open_tokenizer

__all__ = [
    "Data",
    "DataConfig",
    "DataError",
    "MqarSource",
    "PasskeySource",
    "SourceConfig",
    "StdlibSource",
    "SyntheticSource",
    "TextSource",
    "TokensSource",
    "Tokenizer",
    "open_data",
    "open_tokenizer",
]
