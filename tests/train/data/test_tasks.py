"""Tasks: what their documents hold, where loss and answers are marked in rows, and how they refuse."""

import itertools

import numpy as np
import pytest

from train.data import DataError, MqarSource, PasskeySource, SyntheticSource, open_tokenizer
from train.data.corpus import Corpus

BYTES = open_tokenizer("bytes")
IDS = open_tokenizer("ids:64")
PASSKEY = PasskeySource(min_length=30, max_length=63, num_documents=200)
MQAR = MqarSource(min_length=24, max_length=63, min_pairs=2, max_pairs=6, num_documents=200)


def text_of(corpus, document):
    return BYTES.decode(corpus.document(document).tokens)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("filler", ["cycle", "shuffled", "noise"])
@pytest.mark.parametrize("tokenizer", [BYTES, IDS], ids=["bytes", "ids"])
def test_passkey_documents_hide_the_key_that_they_ask_for(tmp_path, tokenizer, filler):
    source = PasskeySource(min_length=300, max_length=500, num_documents=300, filler=filler, key_length=4)
    corpus = source.open(tokenizer, tmp_path)
    assert isinstance(corpus, Corpus)
    places, groups = [], []
    for number, length in enumerate(corpus.documents.lengths):
        document = corpus.document(number)
        tokens, (places_of_answer,) = document.tokens, np.nonzero(document.answers == 0)
        assert len(tokens) == length and tokenizer.end_id not in tokens
        np.testing.assert_array_equal(places_of_answer, np.arange(length - 4, length))
        windows = np.lib.stride_tricks.sliding_window_view(tokens, 4)
        found = np.flatnonzero((windows == tokens[-4:]).all(axis=1))
        assert len(found) == 3 or filler == "noise"  # twice in the text, and the answer
        places.append(found[0] / length)
        groups.append(document.group)
        np.testing.assert_array_equal(corpus.read(number, 7, 19), tokens[7:19])
    assert min(np.bincount(groups, minlength=5)) > 20
    assert np.corrcoef(places, groups)[0, 1] > 0.8
    assert len(corpus.answer_groups) == 5 and corpus.answer_groups[0] == "passkey_depth_0_20"


def test_passkey_text_is_that_of_the_paper(tmp_path):
    corpus = PasskeySource(min_length=500, max_length=500, num_documents=50).open(BYTES, tmp_path)
    for number in range(50):
        text = text_of(corpus, number)
        key = text[-5:]
        assert key.isdigit() and text.startswith("There is an important info hidden")
        assert f" The pass key is {key}. Remember it. {key} is the pass key. " in text
        assert text.endswith(f". What is the pass key? The pass key is {key}")
    assert "green. The sky is blue. The sun is yellow. Here we go. There" in text_of(corpus, 0)


def test_passkey_takes_a_tokenizer_of_words(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = "0 1 2 3 4 5 6 7 8 9 . ? the is key pass what grass sky".split()
    vocabulary = {word: number for number, word in enumerate([*words, "<unk>", "<eos>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(str(tmp_path))
    corpus = PasskeySource(min_length=150, max_length=150, num_documents=5).open(opened, tmp_path)
    document = corpus.document(0)
    assert (document.tokens[-5:] < 10).all() and (document.tokens[-6] >= 10).all()

    vocabulary |= {"seven": vocabulary.pop("7"), "eight": vocabulary.pop("8")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="has ids for fewer than ten digits, wanted one for each; use 'bytes'"):
        PASSKEY.open(open_tokenizer(str(tmp_path)), tmp_path)


def test_mqar_documents_ask_for_every_value_once(tmp_path):
    corpus = MQAR.open(IDS, tmp_path)
    pair_counts = set()
    for number, length in enumerate(corpus.documents.lengths):
        document = corpus.document(number)
        tokens, answers = document.tokens, document.answers
        num_pairs = int(answers.max()) + 1
        pair_counts.add(num_pairs)
        assert len(tokens) == length
        keys, values = tokens[: 2 * num_pairs].reshape(-1, 2).T
        assert len(set(keys)) == len(set(values)) == num_pairs
        assert (keys < 31).all() and (values >= 31).all() and (values < 63).all()
        places = np.flatnonzero(answers >= 0)
        assert len(places) == num_pairs and (places >= 2 * num_pairs).all() and (places % 2 == 1).all()
        value_of = dict(zip(keys, values, strict=True))
        assert [value_of[tokens[place - 1]] for place in places] == tokens[places].tolist()
        assert np.isin(tokens, keys).sum() == 2 * num_pairs  # a key stands nowhere else
        low, high = map(int, corpus.answer_groups[document.group].split("_")[-2:])
        assert low <= num_pairs <= high
    assert pair_counts == {2, 3, 4, 5, 6}
    assert corpus.answer_groups == ("mqar_pairs_2_3", "mqar_pairs_4_7")


@pytest.mark.parametrize(("power", "low", "high"), [(0.01, 0.0, 0.15), (1.0, 0.45, 0.55)])
def test_mqar_gaps_follow_the_power_law(tmp_path, power, low, high):
    source = MqarSource(min_length=2004, max_length=2004, min_pairs=2, max_pairs=2, num_documents=200, power=power)
    corpus = source.open(IDS, tmp_path)
    gaps = [(np.flatnonzero(corpus.document(number).answers >= 0) - 5) / 2 for number in range(200)]
    assert low < np.median(np.concatenate(gaps)) / 1000 + 1e-3 < high


@pytest.mark.parametrize("source", [PASSKEY, MQAR], ids=["passkey", "mqar"])
@pytest.mark.parametrize("loss", ["answers", "all"])
def test_rows_mark_loss_and_answers(open_sources, source, loss):
    source = type(source)(**{**vars(source), "loss": loss})
    held_out = type(source)(**{**vars(source), "loss": loss, "seed": 1, "num_documents": 20})
    data = open_sources(source, held_out_sources=(held_out,), seq_len=128, tokenizer="ids:64")
    (row,) = itertools.islice(data.held_out_batches(batch_size=1), 1)
    row = {name: array[0] for name, array in row.items()}
    corpus = held_out.open(IDS, None)
    of_documents = {corpus.document(number).tokens.tobytes(): corpus.document(number) for number in range(20)}
    num_answers = 0
    for segment in range(row["segment_ids"].max() + 1):
        inside = row["segment_ids"] == segment
        targets, answers = row["targets"][inside], row["answers"][inside]
        document = of_documents[targets[:-1].astype(np.int64).tobytes()]
        assert targets[-1] == IDS.end_id and row["tokens"][inside][0] == IDS.end_id
        wanted = np.append(np.where(document.answers >= 0, document.answers + num_answers, -1), -1)
        np.testing.assert_array_equal(answers, wanted)
        np.testing.assert_array_equal(row["loss_weights"][inside], 1.0 if loss == "all" else answers >= 0)
        assert (row["answer_groups"][inside] == document.group).all()
        num_answers += document.answers.max() + 1
    outside = row["segment_ids"] < 0
    assert (row["answers"][outside] == -1).all() and not row["loss_weights"][outside].any()
    assert "answers" not in data.train[0]  # training has no use for them
    assert data.train[0].keys() == open_sources(SyntheticSource(min_length=5, max_length=9)).train[0].keys()


def test_source_bytes_are_those_of_the_tokens_with_loss(open_sources):
    for loss, wanted in (("answers", 5), ("all", 299)):
        source = PasskeySource(min_length=299, max_length=299, num_documents=4, loss=loss)
        assert open_sources(source, seq_len=300).train[0]["num_bytes"] == wanted


def test_batches_from_any_step_are_those_of_an_uninterrupted_run(open_sources):
    settings = {"seq_len": 128, "tokenizer": "ids:64"}

    def batches(start):
        data = open_sources(PASSKEY, MQAR, **settings)
        read = data.batches(start_step=start, batch_size=2)
        taken = list(itertools.islice(read, 60 - start))  # some epochs
        read.close()
        return taken

    whole = batches(0)
    for start in (1, 17, 59):
        assert all(map(same, batches(start), whole[start:]))


def test_the_seed_of_a_source_decides_its_documents(tmp_path):
    for source in (PASSKEY, MQAR):
        first, again = (source.open(IDS, tmp_path).document(7) for _ in range(2))
        other = type(source)(**{**vars(source), "seed": 1}).open(IDS, tmp_path).document(7)
        np.testing.assert_array_equal(first.tokens, again.tokens)
        assert not np.array_equal(first.tokens, other.tokens)


def test_tasks_are_mixed_with_other_sources_by_weight(open_sources):
    text = SyntheticSource(min_length=127, max_length=127, weight=3)
    data = open_sources(text, PASSKEY, held_out_fraction=0.5, seq_len=128, tokenizer="ids:80")
    share = np.mean([data.train[index]["loss_weights"].mean() > 0.9 for index in range(100)])
    assert share == pytest.approx(0.75, abs=0.02)


def test_held_out_rows_of_several_sources_have_the_same_arrays_and_groups_by_name(open_sources):
    text = SyntheticSource(min_length=100, max_length=127, num_documents=8)
    sources = (text, MQAR, PASSKEY, MqarSource(min_length=24, max_length=63, min_pairs=6, max_pairs=6, num_documents=9))
    data = open_sources(text, held_out_sources=sources, seq_len=128, tokenizer="ids:128")
    assert data.answer_groups[:3] == ("mqar_pairs_2_3", "mqar_pairs_4_7", "passkey_depth_0_20")
    assert len(data.answer_groups) == 7
    batches = list(data.held_out_batches(batch_size=4))
    seen = {int(group) for batch in batches for group in batch["answer_groups"][batch["answers"] >= 0]}
    assert seen == set(range(7))
    assert batches[-1].keys() == batches[0].keys()  # the last is filled up with empty rows
    assert open_sources(text, held_out_fraction=0.5, seq_len=128).answer_groups == ()


def test_refused_settings():
    for fields, message in (
        ({"key_length": 0}, "key_length: got 0, wanted >= 1; raise it"),
        ({"max_length": 29}, "max_length: got 29, wanted >= min_length=30"),
    ):
        with pytest.raises(ValueError, match=message):
            PasskeySource(**{"min_length": 30, "max_length": 63, **fields})
    for fields, message in (
        ({"min_pairs": 0}, "min_pairs: got 0, wanted >= 1"),
        ({"max_pairs": 1}, "max_pairs: got 1, wanted >= min_pairs=2; raise it or lower min_pairs"),
        ({"max_pairs": 7}, "min_length: got 24, wanted >= 28, four tokens for each of max_pairs=7; raise it or lower"),
        ({"power": 1.5}, "power: got 1.5, wanted 0 <= power <= 1; 0.01 is customary"),
    ):
        with pytest.raises(ValueError, match=message):
            MqarSource(**{"min_length": 24, "max_length": 63, "min_pairs": 2, "max_pairs": 6, **fields})


def test_what_does_not_fit_says_so(open_sources, tmp_path):
    with pytest.raises(DataError, match=r"passkey source: got min_length=30, wanted at least \d+, .* lower key_length"):
        PASSKEY.open(BYTES, tmp_path)
    with pytest.raises(DataError, match=r"got data.tokenizer='ids:16', wanted 'ids:17' or more, for ten digits"):
        PASSKEY.open(open_tokenizer("ids:16"), tmp_path)
    PASSKEY.open(open_tokenizer("ids:17"), tmp_path).document(0)
    with pytest.raises(
        DataError, match="got max_pairs=6 with the 11 ids .* lower it or use tokenizer='ids:13' or more"
    ):
        MQAR.open(open_tokenizer("ids:12"), tmp_path)
    MQAR.open(open_tokenizer("ids:13"), tmp_path).document(0)
    with pytest.raises(DataError, match=r"\(passkey\): a document fills \d\d slots, wanted at most 40; .* to 39, or"):
        open_sources(PASSKEY, seq_len=40, tokenizer="ids:64")
    with pytest.raises(DataError, match=r"max_length to 39"):
        open_sources(PASSKEY, seq_len=80, max_document_length=40, tokenizer="ids:64")
