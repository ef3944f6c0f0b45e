"""Words whose loss changes what is said though nothing seen decides them, as tokens of the target's own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from vllm_lvspec.kernels.acceptance import END, NEGATION, NUMBER, ORDER, SPECIAL

KINDS = {"negation": NEGATION, "number": NUMBER, "order": ORDER}

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "negation": (
            "no not n't nothing never none nobody nowhere neither nor cannot without hardly barely scarcely absent "
            "missing except unless instead"
        ),
        "number": (
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen twenty thirty forty fifty hundred thousand million single double twice once "
            "both pair dozen half several few many all each every"
        ),
        "order": (
            "before after first second third then last next later finally initially eventually afterwards afterward "
            "subsequently following earlier previously once meanwhile while until since when during start starts "
            "beginning begin begins opening early shortly soon end ends lastly simultaneously"
        ),
    },
    "de": {
        "negation": (
            "nicht kein keine keinen keiner keines nichts nie niemals niemand nirgends weder noch ohne kaum außer"
        ),
        "number": (
            "null ein eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf hundert tausend beide mehrere"
        ),
        "order": (
            "vor bevor vorher nach nachdem nachher zuerst erst dann danach zuletzt schließlich anfangs später früher "
            "während bis seit als sobald gleichzeitig beginn anfang ende"
        ),
    },
    "es": {
        "negation": "no nada nunca jamás nadie ninguno ninguna ningún ni sin tampoco apenas excepto salvo",
        "number": "cero uno una dos tres cuatro cinco seis siete ocho nueve diez once doce cien mil ambos varios",
        "order": (
            "antes después primero luego entonces último finalmente inicialmente siguiente posteriormente mientras "
            "hasta desde cuando durante inicio principio final"
        ),
    },
    "fr": {
        "negation": "ne non pas rien jamais personne aucun aucune nulle ni sans guère sauf",
        "number": "zéro un une deux trois quatre cinq six sept huit neuf dix onze douze cent mille plusieurs",
        "order": (
            "avant après premier première abord puis ensuite alors dernier enfin finalement initialement suivant "
            "pendant jusque depuis quand lorsque début fin"
        ),
    },
    "zh": {
        "negation": "不 没 没有 无 未 非 别 莫 从不 并非 除了",
        "number": "零 一 二 两 三 四 五 六 七 八 九 十 百 千 万 几 多 双 半",
        "order": "先 首先 最先 开始 然后 接着 之后 后来 随后 最后 最终 之前 以前 以后 同时 期间 直到 当",
    },
}
_LEAST_LETTERS = 4
_LARGEST_NUMBER = 999  # tokenizers have no digits beyond these in one token


def guard_words(languages: Iterable[str], own: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    """Words by kind: the lists of `languages`, and `own` added to them."""
    words: dict[str, set[str]] = {kind: set(own.get(kind, ())) for kind in KINDS}
    for language in languages:
        for kind, text in WORDS[language].items():
            words[kind].update(text.split())
    return words


def token_kinds(
    tokenizer: Any, vocab_size: int, end_ids: Iterable[int], words: Mapping[str, Iterable[str]]
) -> torch.Tensor:
    """Kinds of every token, as bits of `kernels.acceptance`: `[vocab_size]`, uint8, on the host.

    A word is looked for with and without a space before it, small, capitalised and in capitals. Of a word that takes
    several tokens the longest is guarded if it has four letters or more: shorter ones are in too many other words, so
    such a word is not guarded. Digits are numbers.
    """
    kinds = torch.zeros(vocab_size, dtype=torch.uint8)

    def mark(token_ids: Iterable[int], bit: int) -> None:
        for token in token_ids:
            if 0 <= token < vocab_size:
                kinds[token] |= bit

    for kind, bit in KINDS.items():
        listed = list(words.get(kind, ()))
        if kind == "number":
            listed += [str(n) for n in range(_LARGEST_NUMBER + 1)]
        for word in listed:
            for form in {word, word.lower(), word.capitalize(), word.upper()}:
                for text in (form, " " + form):
                    mark(_token_of(tokenizer, text), bit)
    mark(tokenizer.all_special_ids, SPECIAL)
    # All of them: tokens that open or close reasoning and tool calls are often not called special.
    mark(getattr(tokenizer, "added_tokens_decoder", {}), SPECIAL)
    mark(end_ids, END | SPECIAL)
    return kinds


def _token_of(tokenizer: Any, text: str) -> list[int]:
    """The token that stands for `text`, or of several the longest, where that says enough of the word."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [(tokenizer.decode([i]).strip(), i) for i in ids]
    if len(ids) <= 1:
        return [i for piece, i in pieces if piece]
    piece, token = max(pieces, key=lambda pair: len(pair[0]))
    return [token] if len(piece) >= _LEAST_LETTERS and "\ufffd" not in piece else []
