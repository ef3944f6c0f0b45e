"""Guarded words as tokens of the bundled tokenizer, whose vocabulary is small: many words take several tokens."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import vllm_lvspec
from vllm_lvspec.kernels.acceptance import END, NEGATION, NUMBER, ORDER, SPECIAL
from vllm_lvspec.verify.guards import KINDS, WORDS, guard_words, token_kinds

TARGET = Path(vllm_lvspec.__file__).parent / "reference/checkpoints/qwen2_5_vl/target"
# Words of two kinds in one language that are meant to be of both.
OF_TWO_KINDS = {("en", "once")}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def kind_of(tokenizer):
    """`kind_of(text, words, ...)`: the kinds of the one token that `text` is."""

    def find(text, words, **options):
        kinds = token_kinds(tokenizer, len(tokenizer), options.pop("end_ids", ()), words)
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        return int(kinds[token])

    return find


@pytest.mark.parametrize(
    ("word", "kind", "forms"),
    [
        ("not", "negation", [" not"]),
        ("no", "negation", ["No", " No"]),
        ("then", "order", ["Then", " Then"]),
        ("after", "order", [" after", "After", " After"]),
        ("all", "number", ["all", " all", " All"]),
        ("a", "number", ["a", " a", "A", " A"]),
    ],
)
def test_words_are_guarded_in_all_forms_that_are_one_token(kind_of, word, kind, forms):
    for form in forms:
        assert kind_of(form, {kind: [word]}) == KINDS[kind]
        assert kind_of(form, {}) == 0


@pytest.mark.parametrize("word", ["Without", "WITHOUT", "without"])
def test_a_word_is_guarded_in_all_forms_however_it_is_written_in_the_settings(kind_of, word):
    assert kind_of(" without", {"negation": [word]}) == NEGATION


@pytest.mark.parametrize(
    ("text", "longest"), [("neither", ["ither"]), ("beginning", ["ning"]), (" finally", ["ally"]), (" twelve", [])]
)
def test_of_a_word_of_several_tokens_the_longest_is_guarded_if_it_has_four_letters(tokenizer, text, longest):
    kinds = token_kinds(tokenizer, len(tokenizer), (), {"negation": [text.strip()]})
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 1
    assert [tokenizer.decode([i]) for i in ids if int(kinds[i]) & NEGATION] == longest


def test_every_guarded_token_is_a_listed_word_or_much_of_one(tokenizer):
    """Parts of words such as " the" in " then" would guard what is said all the time."""
    words = guard_words(["en"], {})
    kinds = token_kinds(tokenizer, len(tokenizer), (), words)
    for kind, listed in words.items():
        guarded = [tokenizer.decode([i]).strip() for i in range(len(tokenizer)) if int(kinds[i]) & KINDS[kind]]
        assert len(guarded) > 10
        for piece in guarded:
            in_words = [word for word in listed if piece.lower() in word.lower()]
            assert piece.isdigit() or piece.lower() in listed or (len(piece) >= 4 and in_words), piece


def test_digits_are_numbers_with_and_without_words_of_this_kind(tokenizer):
    for words in ({}, guard_words(["en"], {}), {"number": ()}):
        kinds = token_kinds(tokenizer, len(tokenizer), (), words)
        for text in ("7", "0", "12", " 3", "450", " 999", "2026"):
            ids = [i for i in tokenizer.encode(text, add_special_tokens=False) if tokenizer.decode([i]).strip()]
            assert all(int(kinds[i]) & NUMBER for i in ids)


def test_what_is_seen_is_not_guarded(tokenizer):
    kinds = token_kinds(tokenizer, len(tokenizer), (), guard_words(["en"], {}))
    for text in (" red", " blue", " circle", " left", " moves", ".", ","):
        assert not any(int(kinds[i]) for i in tokenizer.encode(text, add_special_tokens=False)), text


def test_a_blank_word_guards_nothing(tokenizer):
    for blank in ("", " "):
        kinds = token_kinds(tokenizer, len(tokenizer), (), {"negation": [blank]})
        assert not int((kinds & NEGATION).sum())


def test_users_words_are_added_to_those_of_the_languages(kind_of):
    words = guard_words(["en"], {"order": ("red",), "number": ("blue",)})
    assert kind_of(" red", words) == ORDER
    assert kind_of(" blue", words) == NUMBER
    assert kind_of(" not", words) == NEGATION
    assert guard_words([], {"order": ("red",)}) == {"negation": set(), "number": set(), "order": {"red"}}
    assert guard_words(["en", "de"], {})["negation"] >= {"not", "nicht"}


def test_a_word_of_two_kinds_is_guarded_as_both(kind_of):
    assert kind_of(" once", guard_words(["en"], {})) == NUMBER | ORDER


def test_special_tokens_and_ends_are_known_whatever_is_guarded(tokenizer):
    red = tokenizer.encode(" red", add_special_tokens=False)
    kinds = token_kinds(tokenizer, len(tokenizer), [tokenizer.eos_token_id, *red], {})
    special = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|video_pad|>", "<|vision_end|>"])
    assert [int(kinds[i]) for i in special] == [SPECIAL] * 4
    assert int(kinds[tokenizer.eos_token_id]) == END | SPECIAL
    assert int(kinds[red[0]]) & END  # a generation config may name any token
    assert int((kinds & END).bool().sum()) == 2


def test_vocabularies_are_padded_or_cut_without_changing_a_token(tokenizer):
    words = guard_words(["en"], {})
    whole = token_kinds(tokenizer, len(tokenizer), [tokenizer.eos_token_id], words)
    padded = token_kinds(tokenizer, len(tokenizer) + 70, [tokenizer.eos_token_id, len(tokenizer) + 900], words)
    cut = token_kinds(tokenizer, 300, [tokenizer.eos_token_id], words)
    assert padded.shape == (len(tokenizer) + 70,) and padded.dtype == torch.uint8 and not padded.is_cuda
    assert torch.equal(padded[: len(tokenizer)], whole)
    assert torch.equal(cut, whole[:300])


@pytest.mark.parametrize("language", WORDS)
def test_every_language_has_words_of_every_kind_and_each_word_once(language):
    lists = {kind: text.split() for kind, text in WORDS[language].items()}
    assert lists.keys() == KINDS.keys()
    for words in lists.values():
        assert words and len(words) == len(set(words))
        assert all(word == word.strip(",.;") for word in words)
    for kind, words in lists.items():
        for other, theirs in lists.items():
            if other > kind:
                assert {(language, word) for word in set(words) & set(theirs)} <= OF_TWO_KINDS
