"""The tokenizer against CLIP's own ids, and what must hold for any sentence."""

import hashlib
import json
import time

import pytest
import torch
from helpers import ROOT

from utils import tokenizer
from utils.tokenizer import END_ID, START_ID, token_lengths, tokenize

GOLDEN = json.loads((ROOT / "tests/golden" / "tokens.json").read_text("utf-8"))
CASES = [
    pytest.param(int(length), case["sentence"], case["ids"], id=f"{length}-{number}")
    for length, cases in GOLDEN.items()
    for number, case in enumerate(cases)
]


def ids(sentence: str) -> list[int]:
    return tokenize(sentence, token_lengths([sentence])[0])[0].tolist()


@pytest.mark.parametrize(("length", "sentence", "expected"), CASES)
def test_ids_equal_those_of_the_official_code(length, sentence, expected):
    assert tokenize(sentence, length).tolist() == [expected]


def test_vocabulary_is_the_published_file_and_every_id_is_taken_once():
    digest = hashlib.sha256(tokenizer.VOCABULARY_PATH.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert sorted(tokenizer._vocabulary()[1].values()) == list(range(49_408))


def test_batch_is_one_row_a_sentence():
    tokens = tokenize(["red shirt", "", "man on left"], 17)
    assert tokens.shape == (3, 17)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[2:], tokenize("man on left", 17))
    assert tokenize([], 17).shape == (0, 17)


@pytest.mark.parametrize("sentence", [case["sentence"] for case in GOLDEN["77"]])
def test_shorter_context_is_a_prefix_that_still_ends_with_the_end_token(sentence):
    (length,) = token_lengths([sentence])
    whole = tokenize(sentence, length + 5)[0]
    assert whole[0] == START_ID
    assert whole[length - 1] == END_ID
    assert whole[length:].tolist() == [0] * 5
    for context_length in range(2, length + 5):
        tokens = tokenize(sentence, context_length)[0]
        kept = min(context_length, length) - 1
        assert torch.equal(tokens[:kept], whole[:kept])
        assert tokens[kept] == END_ID


def test_lengths_count_start_and_end_and_ignore_the_cut():
    assert token_lengths(["", "red shirt", "very " * 50]) == [2, 4, 52]


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("The  RED\t shirt \n", "the red shirt"),
        ("the\u00a0red\u3000shirt", "the red shirt"),
        ("shirt &amp; tie", "shirt & tie"),
        ("shirt &amp;amp; tie", "shirt & tie"),
        ("man\u2019s \u201cblue\u201d hat", 'man\'s "blue" hat'),
        ("MAN'S HAT", "man's hat"),
        ("cafÃ©", "café"),
        ("", " \n"),
    ],
)
def test_writing_that_does_not_change_the_words_does_not_change_the_ids(written, plain):
    assert ids(written) == ids(plain)


@pytest.mark.parametrize(
    "sentence", ["🐕 left", "日本語の犬", "\x00\x07", "\ud800 dog", "¿¡?", "١٢"]
)
def test_any_characters_have_ids(sentence):
    assert all(0 <= token <= END_ID for token in ids(sentence))


def test_special_tokens_in_a_sentence_are_single_ids():
    assert ids("<|startoftext|> dog <|EndOfText|>")[1:-1] == [START_ID, 1929, END_ID]


@pytest.mark.parametrize("text", ["a" * 10_000, "qwzxjk" * 1_667, "日本語" * 3_334, "dog " * 2_500])
def test_ten_thousand_characters_take_no_noticeable_time(text):
    tokenize("dog", 17)
    start = time.process_time()
    tokens = tokenize(text, 17)
    assert time.process_time() - start < 1
    assert tokens[0, -1] == END_ID
