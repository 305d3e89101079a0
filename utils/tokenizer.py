"""Sentences as token ids: CLIP's byte-level BPE.

A sentence is cleaned and split into words; a word is spelled in UTF-8 bytes, each byte written as
one printable character, the last one marked as the end of the word; then neighbouring symbols are
merged, the earliest-learned merge first, and what is left is looked up.

Vocabulary, 49,408 ids in this order: 256 bytes, the same 256 at the end of a word, one symbol for
each of 48,894 merges, start (49406), end (49407). Padding is id 0.
"""

import gzip
import html
import itertools
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import ftfy
import regex
import torch

VOCABULARY_PATH = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
NUM_MERGES = 48_894
START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID, PAD_ID = 49_406, 49_407, 0
WORD_END = "</w>"

WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
BLANKS = regex.compile(r"\s+")
# Bytes that Latin-1 prints stand for themselves, the others for the code points from 256 on: so
# every byte is a character that is visible and no blank.
PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("ÿ") + 1)} - {ord("\u00ad")}
SPARE = itertools.count(256)
BYTE_SYMBOLS = [chr(byte if byte in PRINTABLE else next(SPARE)) for byte in range(256)]


def tokenize(texts: str | Sequence[str], context_length: int) -> torch.LongTensor:
    """Turn sentences into the ids that the text encoder takes.

    Args:
        texts: one sentence, or B of them.
        context_length: L, at least 2; how many ids a row has, start and end included. A sentence
            that is longer is cut, and its last id is the end token.
    Returns:
        (B, L) int64 in [0, 49407], padded with 0; B = 1 for a single string.
    """
    sentences = [texts] if isinstance(texts, str) else texts
    tokens = torch.full((len(sentences), context_length), PAD_ID, dtype=torch.long)
    for row, sentence in zip(tokens, sentences, strict=True):
        ids = _encode(sentence)
        if len(ids) > context_length:
            ids = (*ids[: context_length - 1], END_ID)
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def token_lengths(sentences: Sequence[str]) -> list[int]:
    """Count each sentence's tokens, start and end included, before any cut."""
    return [len(_encode(sentence)) for sentence in sentences]


def has_words(sentence: str) -> bool:
    """Tell whether any token lies between the start and the end token."""
    return WORD.search(_clean(sentence)) is not None


@lru_cache(maxsize=1 << 16)  # a training visits the same sentences in every epoch
def _encode(sentence: str) -> tuple[int, ...]:
    words = WORD.findall(_clean(sentence))
    return (START_ID, *itertools.chain.from_iterable(map(_word_ids, words)), END_ID)


def _clean(sentence: str) -> str:
    """Repair mojibake and curly quotes, resolve HTML entities, collapse blanks, lower-case."""
    # Twice, because web text is often escaped twice ("&amp;lt;"), and CLIP was trained so.
    text = html.unescape(html.unescape(ftfy.fix_text(sentence)))
    return BLANKS.sub(" ", text.strip()).strip().lower()


@lru_cache(maxsize=1 << 16)
def _word_ids(word: str) -> tuple[int, ...]:
    ranks, ids = _vocabulary()
    if word in (START, END):
        return (ids[word],)
    symbols = [BYTE_SYMBOLS[byte] for byte in word.encode("utf-8")]
    symbols[-1] += WORD_END
    # Apply the earliest-learned merge that fits, everywhere, until none fits.
    while pairs := set(itertools.pairwise(symbols)) & ranks.keys():
        best, joined = min(pairs, key=ranks.__getitem__), []
        for symbol in symbols:
            if joined and (joined[-1], symbol) == best:
                joined[-1] += symbol
            else:
                joined.append(symbol)
        symbols = joined
    return tuple(ids[symbol] for symbol in symbols)


@cache
def _vocabulary() -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """Read when each pair of symbols was merged first, and each symbol's token id."""
    with gzip.open(VOCABULARY_PATH, "rt", encoding="utf-8") as lines:
        # The first line is a version.
        merges = [tuple(line.split()) for line in itertools.islice(lines, 1, NUM_MERGES + 1)]
    # Ids count the bytes that print as themselves first, then the others: the characters' order.
    alphabet = sorted(BYTE_SYMBOLS)
    symbols = [*alphabet, *(s + WORD_END for s in alphabet), *map("".join, merges), START, END]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return ranks, {symbol: i for i, symbol in enumerate(symbols)}
