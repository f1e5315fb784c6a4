"""Tokenizers made locally: letters, bytes and the words of a few sentences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel

MERGES = 1500
"""Merges of a vocabulary, at most: with them the commonest words are one token each."""

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The form of a conversation that Qwen's models are given."""

QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]+", text)


def _common(words: Iterable[str]) -> list[str]:
    """Words, the commonest first, in one order everywhere."""
    counts = Counter(words)
    return sorted(counts, key=lambda word: (-counts[word], word))


def _chains(words: Iterable[str], end: str = "") -> list[tuple[str, str]]:
    """Merges that build each word letter by letter from its start.

    Learning them as byte-pair encoding does would depend on the order of a hash map where two
    pairs are as common (the trainer of `tokenizers` breaks such ties differently each time).
    """
    merges: dict[tuple[str, str], None] = {}
    for word in _common(words):
        letters = [*word[:-1], word[-1] + end]
        for place in range(1, len(letters)):
            merges.setdefault(("".join(letters[:place]), letters[place]))
        if len(merges) >= MERGES:
            break
    return list(merges)


def _vocabulary(tokens: Iterable[str], merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for token in (*tokens, *(first + second for first, second in merges)):
        vocab.setdefault(token, len(vocab))
    return vocab


def _byte_pairs(
    texts: Iterable[str], special: tuple[str, ...], *, first: tuple[str, ...] = ()
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Every byte, and words with the blank before them."""
    split = ByteLevel(add_prefix_space=False)
    words = (word for text in texts for word, _ in split.pre_tokenize_str(text))
    merges = _chains(words)
    vocab = _vocabulary([*first, *sorted(ByteLevel.alphabet())], merges)
    return _vocabulary([*vocab, *special], ()), merges


def _unigrams(texts: Iterable[str], first: tuple[str, ...]) -> list[tuple[str, float]]:
    """Whole words and single letters, the commoner the likelier."""
    letters = sorted({chr(code) for code in range(33, 127)} | {"▁"})
    words = ["▁" + word for word in _common(w for text in texts for w in text.split())[:700]]
    pieces = [(piece, 0.0) for piece in first]
    pieces += [(letter, -12.0) for letter in letters]
    known = {piece for piece, _ in pieces}
    return pieces + [
        (word, -2.0 - 0.001 * place) for place, word in enumerate(words) if word not in known
    ]


def _spaced_pairs(
    texts: Iterable[str], first: tuple[str, ...]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Words over text whose blanks are `▁`, as Llama's and Gemma's tokenizers read it."""
    letters = sorted({chr(code) for code in range(33, 127)} | {"▁", "\n"})
    merges = _chains(
        ("" if place else "▁") + word
        for text in texts
        for part in text.split()
        for place, word in enumerate(_words(part))
        if word.isascii()
    )
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    return _vocabulary([*first, *raw, *letters], merges), merges


def _clip(texts: Iterable[str]) -> Any:
    merges = _chains(
        (word for text in texts for word in _words(text.lower()) if word.isascii()), "</w>"
    )
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    vocab = _vocabulary([*_vocabulary(tokens, merges), "<|startoftext|>", "<|endoftext|>"], ())
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _t5(texts: Iterable[str]) -> Any:
    pieces = _unigrams(texts, ("<pad>", "</s>", "<unk>"))
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _qwen(texts: Iterable[str]) -> Any:
    vocab, merges = _byte_pairs(texts, QWEN_SPECIAL)
    return transformers.Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        chat_template=CHAT,
        extra_special_tokens=list(QWEN_SPECIAL),
        model_max_length=4096,
    )


def _gemma(texts: Iterable[str]) -> Any:
    special = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    vocab, merges = _spaced_pairs(texts, ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *special))
    return transformers.GemmaTokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=list(special), model_max_length=4096
    )


def _llama(texts: Iterable[str]) -> Any:
    special = ("<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    vocab, merges = _spaced_pairs(texts, ("<unk>", "<s>", "</s>", "<pad>", *special))
    return transformers.LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        pad_token="<pad>",
        extra_special_tokens=list(special),
        chat_template=CHAT,
        model_max_length=4096,
    )


def _roberta(texts: Iterable[str]) -> Any:
    vocab, merges = _byte_pairs(texts, ("<mask>",), first=("<s>", "<pad>", "</s>", "<unk>"))
    return transformers.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _gpt2(texts: Iterable[str]) -> Any:
    vocab, merges = _byte_pairs(texts, ("<|endoftext|>",))
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _xlm_roberta(texts: Iterable[str]) -> Any:
    pieces = _unigrams(texts, ("<s>", "<pad>", "</s>", "<unk>"))
    return transformers.XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=77)


def _bert(texts: Iterable[str]) -> Any:
    first = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = _common(word.lower() for text in texts for word in _words(text))[:700]
    pieces = [*first, *letters, *("##" + letter for letter in letters), *words]
    vocab = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.BertTokenizer(vocab=vocab, model_max_length=77)


TOKENIZERS: dict[str, Callable[[Iterable[str]], Any]] = {
    "CLIPTokenizer": _clip,
    "T5Tokenizer": _t5,
    "T5TokenizerFast": _t5,
    "Qwen2Tokenizer": _qwen,
    "Qwen2TokenizerFast": _qwen,
    "GemmaTokenizer": _gemma,
    "GemmaTokenizerFast": _gemma,
    "LlamaTokenizer": _llama,
    "LlamaTokenizerFast": _llama,
    "RobertaTokenizer": _roberta,
    "GPT2Tokenizer": _gpt2,
    "XLMRobertaTokenizer": _xlm_roberta,
    "BertTokenizer": _bert,
    "ByT5Tokenizer": lambda texts: transformers.ByT5Tokenizer(extra_ids=0),
}
"""How each class is made of sentences."""

OF_ENCODER = (
    ("CLIP", "CLIPTokenizer"),
    ("UMT5", "T5Tokenizer"),
    ("T5Gemma", "GemmaTokenizer"),
    ("T5", "T5Tokenizer"),
    ("Gemma", "GemmaTokenizer"),
    ("Qwen", "Qwen2Tokenizer"),
    ("Llama", "LlamaTokenizer"),
    ("Llava", "LlamaTokenizer"),
    ("Mistral", "LlamaTokenizer"),
    ("Ministral", "LlamaTokenizer"),
    ("SmolLM3", "Qwen2Tokenizer"),
    ("Glm", "Qwen2Tokenizer"),
    ("Bert", "BertTokenizer"),
)
"""The tokenizer of an encoder where a pipeline asks for any, by how the encoder's name begins."""


def tokenizer_of(encoder: str) -> str | None:
    """Name the tokenizer class that an encoder's class is used with."""
    return next((kind for start, kind in OF_ENCODER if encoder.startswith(start)), None)
