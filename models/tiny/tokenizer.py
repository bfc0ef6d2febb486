"""A byte-level BPE vocabulary that knows given words, in the files CLIP's tokenizer reads.

As in CLIP, the ids are the 256 bytes, the 256 bytes that end a word, the merges in order, then the
start and the end of text. Any text tokenizes: what is not a known word falls into smaller pieces.
"""

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"


def write_tokenizer(folder: Path, *, words: Sequence[str], max_tokens: int = 77) -> int:
    """Write vocab.json, merges.txt and the two configs, and return the size of the vocabulary.

    Each of ``words``, in lower case, becomes one token; their order does not matter.

    Raises:
        ValueError: there are no words, or one is not made of letters only. CLIP's tokenizer cuts
            at spaces, digits and punctuation before it looks for merges.
    """
    merges = train_merges(words)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + _END_OF_WORD for byte in alphabet)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [START_TOKEN, END_TOKEN]
    special = {"bos_token": START_TOKEN, "eos_token": END_TOKEN}
    special |= {"unk_token": END_TOKEN, "pad_token": END_TOKEN}
    config = {"model_max_length": max_tokens, "do_lower_case": True, "add_prefix_space": False}
    contents = {
        "vocab.json": {token: number for number, token in enumerate(tokens)},
        "special_tokens_map.json": special,
        "tokenizer_config.json": special | config | {"tokenizer_class": "CLIPTokenizer"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(tokens)


def train_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the merges, in order, that join each word into one token (Sennrich et al. 2016).

    The most frequent pair is merged first, the alphabetically first of equals, until no pair is
    left. Each merge is made in all words at once, as the tokenizer will apply it: a chain of merges
    made for one word alone could be cut by an earlier merge made for another.

    Raises:
        ValueError: there are no words, or one is not made of letters only.
    """
    pieces = list({tuple(_split_bytes(word)) for word in words})
    if not pieces:
        raise ValueError("words must hold at least one word, but got none")
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge_pair(word, best) for word in pieces]


def _split_bytes(word: str) -> list[str]:
    """Return a word's bytes in CLIP's printable alphabet, the last marked as ending the word."""
    normal = unicodedata.normalize("NFC", word).lower()
    if not normal.isalpha():
        raise ValueError(
            f"a word must be made of letters only, but got {word!r}; "
            "split it at spaces, digits and punctuation"
        )
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    mapped = "".join(text for text, _ in byte_level.pre_tokenize_str(normal))
    return [*mapped[:-1], mapped[-1] + _END_OF_WORD]


def _merge_pair(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Return the word with each occurrence of the pair, from the left, joined."""
    joined: list[str] = []
    position = 0
    while position < len(word):
        if word[position : position + 2] == pair:
            joined.append("".join(pair))
            position += 2
        else:
            joined.append(word[position])
            position += 1
    return tuple(joined)
