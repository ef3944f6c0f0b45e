import json
import re
from pathlib import Path

import pytest

from vllm_lvspec.config import SELF, LVSpecConfig, LVSpecConfigError, names_lvspec
from vllm_lvspec.kernels.relevance import MAX_TOP_N
from vllm_lvspec.verify.sources import AnchorSource


@pytest.mark.parametrize("value", ["lvspec", "lvspec:/some/where", {"method": "lvspec", "model": "x"}])
def test_the_method_is_recognised(value):
    assert names_lvspec(value)


@pytest.mark.parametrize("value", [None, "ngram", "lvspecx", {"method": "ngram"}, {"model": "lvspec"}, 3])
def test_other_methods_are_not_ours(value):
    assert not names_lvspec(value)


def test_the_word_means_all_defaults_and_a_colon_names_the_drafter():
    assert LVSpecConfig.parse("lvspec") == LVSpecConfig()
    assert LVSpecConfig.parse("lvspec:a/b:c").model == "a/b:c"
    defaults = LVSpecConfig()
    assert defaults.num_speculative_tokens == 10
    assert (defaults.pruning, defaults.pruning_ratio) == ("uniform", 0.9)
    assert (defaults.policy, defaults.anchor_top_n) == ("lvspec", 10)


def test_drafts_are_of_one_length_and_the_drafter_self_copies_unless_it_is_said_otherwise():
    defaults = LVSpecConfig()
    assert (defaults.draft_length, defaults.self_cache) == ("fixed", "copy")
    assert defaults.model is None  # the partner of the target is known only with the target
    written = {"method": "lvspec", "draft-length": "fixed", "self-cache": "compute"}
    assert (LVSpecConfig.parse(written).draft_length, LVSpecConfig.parse(written).self_cache) == ("fixed", "compute")


def test_the_drafter_self_is_named_in_either_way():
    assert LVSpecConfig.parse("lvspec:self").model == LVSpecConfig.parse({"method": "lvspec", "model": "self"}).model
    assert LVSpecConfig.parse("lvspec:self").model == SELF == "self"


def test_dashes_in_keys_mean_underscores_as_elsewhere_in_vllm():
    assert LVSpecConfig.parse({"method": "lvspec", "num-speculative-tokens": 3}).num_speculative_tokens == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prunning": "none"}, ["prunning", "unknown key", "pruning_ratio"]),
        ({"num_speculative_tokens": 0}, ["num_speculative_tokens=0", "greater than or equal to 1"]),
        ({"num_speculative_tokens": 129}, ["num_speculative_tokens=129", "less than or equal to 128"]),
        ({"num_speculative_tokens": 2.5}, ["num_speculative_tokens=2.5", "valid integer"]),
        ({"num_speculative_tokens": True}, ["num_speculative_tokens=true", "valid integer"]),
        ({"pruning_ratio": 1.0}, ["pruning_ratio=1.0", "less than 1"]),
        ({"pruning_ratio": -0.1}, ["pruning_ratio=-0.1", "greater than or equal to 0"]),
        ({"pruning_ratio": float("nan")}, ["pruning_ratio=NaN", "finite"]),
        (
            {"pruning": "magic"},
            ['pruning="magic"', "attention, none, random, redundancy, similarity, uniform"],
        ),
        ({"pruning": ["uniform"]}, ['pruning=["uniform"]', "valid string"]),
        ({"draft_length": "short"}, ['draft_length="short"', "fixed", "adaptive"]),
        ({"draft_length": 5}, ["draft_length=5", "fixed", "adaptive"]),
        ({"draft_length": None}, ["draft_length=null", "fixed", "adaptive"]),
        ({"self_cache": "share"}, ['self_cache="share"', "copy", "compute"]),
        ({"self_cache": True}, ["self_cache=true", "copy", "compute"]),
        ({"policy": "loose"}, ['policy="loose"', "strict", "fly", "lvspec", "random"]),
        ({"policy": ["strict"]}, ['policy=["strict"]', "strict"]),
        ({"relaxation": 1.01}, ["relaxation=1.01", "less than or equal to 1"]),
        ({"relaxation": -0.1}, ["relaxation=-0.1", "greater than or equal to 0"]),
        ({"relaxation": float("nan")}, ["relaxation=NaN", "finite"]),
        ({"relaxation": "most"}, ['relaxation="most"', "valid number"]),
        ({"max_relaxation": 2}, ["max_relaxation=2", "less than or equal to 1"]),
        ({"relaxation": 0.6, "max_relaxation": 0.5}, ["relaxation=0.6", "at most max_relaxation=0.5"]),
        ({"anchor_source": "layer"}, ['anchor_source="layer"', "hidden", "layer:I", "value", "embedding"]),
        ({"anchor_source": "layer:-1"}, ['anchor_source="layer:-1"', "layer:I"]),
        ({"anchor_source": "embedding:read"}, ['anchor_source="embedding:read"', "must be one of"]),
        ({"anchor_source": ""}, ['anchor_source=""', "must be one of"]),
        ({"anchor_top_n": 0}, ["anchor_top_n=0", "greater than or equal to 1"]),
        ({"anchor_top_n": MAX_TOP_N + 1}, [f"anchor_top_n={MAX_TOP_N + 1}", f"less than or equal to {MAX_TOP_N}"]),
        ({"anchor_top_n": 2.0}, ["anchor_top_n=2.0", "valid integer"]),
        ({"anchor_threshold": 1.5}, ["anchor_threshold=1.5", "less than or equal to 1"]),
        ({"anchor_threshold": -1.5}, ["anchor_threshold=-1.5", "greater than or equal to -1"]),
        ({"anchor_threshold": float("-inf")}, ["anchor_threshold=-Infinity", "finite"]),
        ({"anchor_projection": 7}, ["anchor_projection=7", "greater than or equal to 8"]),
        ({"anchor_projection": 64.0}, ["anchor_projection=64.0", "valid integer"]),
        ({"probability_floor": 1.1}, ["probability_floor=1.1", "less than or equal to 1"]),
        ({"probability_floor": float("nan")}, ["probability_floor=NaN", "finite"]),
        ({"shift_window": -1}, ["shift_window=-1", "greater than or equal to 0"]),
        ({"shift_window": 129}, ["shift_window=129", "less than or equal to 128"]),
        ({"shift_window": True}, ["shift_window=true", "valid integer"]),
        ({"shift_direction": "forth"}, ['shift_direction="forth"', "both", "back"]),
        ({"guards": "negation+colour"}, ["guards=", "colour", "must be of negation, number, order"]),
        ({"guards": ["numbers"]}, ["guards=", "numbers", "must be of negation, number, order"]),
        ({"guards": 3}, ["guards=3", "valid tuple"]),
        ({"guard_languages": "en+xx"}, ["guard_languages=", "xx", "must be of en, de"]),
        ({"guard_words": {"colour": ["red"]}}, ["guard_words=", "colour", "must be of negation, number, order"]),
        ({"guard_words": {"order": "then"}}, ["guard_words.order=", '"then"', "valid tuple"]),
        ({"guard_words": ["then"]}, ['guard_words=["then"]', "valid dictionary"]),
        ({"fly_window": -1}, ["fly_window=-1", "greater than or equal to 0"]),
        ({"fly_window": 129}, ["fly_window=129", "less than or equal to 128"]),
        ({"fly_entropy": -0.1}, ["fly_entropy=-0.1", "greater than or equal to 0"]),
        ({"fly_entropy": float("inf")}, ["fly_entropy=Infinity", "finite"]),
        ({"model": ""}, ['model=""', "at least 1 character"]),
        ({"draft_quantization": ""}, ['draft_quantization=""', "at least 1 character", "--quantization"]),
        ({"draft_quantization": 8}, ["draft_quantization=8", "valid string"]),
        ({"draft_hf_overrides": [1]}, ["draft_hf_overrides=[1]", "valid dictionary"]),
        ({"draft_cache_gib": 0}, ["draft_cache_gib=0", "greater than 0"]),
        ({"embedding_cache_gib": float("inf")}, ["embedding_cache_gib=Infinity", "finite"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_range(settings, words):
    with pytest.raises(LVSpecConfigError) as caught:
        LVSpecConfig.parse({"method": "lvspec", **settings})
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(LVSpecConfigError, match=r"num_speculative_tokens=0.*; .*pruning_ratio=2"):
        LVSpecConfig.parse({"method": "lvspec", "num_speculative_tokens": 0, "pruning_ratio": 2})


def test_a_colon_without_a_drafter_is_refused():
    with pytest.raises(LVSpecConfigError, match="no drafter after the colon"):
        LVSpecConfig.parse("lvspec:")


def parsed(**settings):
    return LVSpecConfig.parse({"method": "lvspec", **settings})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model", [None, "self", "a/b", "/self"]),
        ("draft_length", ["fixed", "adaptive"]),
        ("self_cache", ["copy", "compute"]),
        ("pruning", ["none", "uniform", "random", "attention", "similarity", "redundancy"]),
        ("policy", ["strict", "fly", "lvspec", "random"]),
        ("relaxation", [0, 0.5, 1]),
        ("max_relaxation", [0.8, 1.0]),
        ("anchor_top_n", [1, MAX_TOP_N]),
        ("anchor_threshold", [None, -1, 0.0, 1]),
        ("anchor_projection", [None, 8, 4096]),
        ("anchor_source", ["hidden", "hidden:read", "layer:0", "layer:12:read", "value", "value:read", "embedding"]),
        ("probability_floor", [0, 0.3, 1]),
        ("shift_window", [0, 128]),
        ("shift_direction", ["both", "back"]),
        ("draft_quantization", [None, "auto", "fp8", "compressed-tensors"]),
        ("fly_window", [0, 6, 128]),
        ("fly_entropy", [0, 0.3, 5.0]),
    ],
)
def test_the_ends_of_every_range_are_in_it(key, values):
    for value in values:
        assert getattr(parsed(**{key: value}), key) == value


def test_no_quantisation_has_a_name_and_what_is_chosen_another():
    assert parsed().draft_quantization == "auto" == parsed(draft_quantization="Auto").draft_quantization
    assert parsed(draft_quantization="none").draft_quantization is None
    assert parsed(draft_quantization="MXFP4").draft_quantization == "mxfp4"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("negation+order", ("negation", "order")),
        (["negation", "order"], ("negation", "order")),
        (("number",), ("number",)),
        ("number", ("number",)),
        ("", ()),
        ([], ()),
        ("+", ()),
    ],
)
def test_lists_may_be_joined_by_a_plus(given, meant):
    assert parsed(guards=given).guards == meant


def test_languages_and_words_of_ones_own_may_be_given():
    assert parsed(guard_languages="en+de+zh").guard_languages == ("en", "de", "zh")
    assert parsed(guard_words={"order": ["anon"], "number": []}).guard_words == {"order": ("anon",), "number": ()}


def test_settings_survive_the_way_through_json():
    config = parsed(guards="order+number", guard_words={"order": ["anon"]}, anchor_threshold=0.5, relaxation=0.3)
    assert LVSpecConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("settings", "is_lossy"),
    [
        ({"policy": "strict"}, False),
        ({"policy": "strict", "relaxation": 0.9}, False),
        ({"relaxation": 0}, False),
        ({"relaxation": 0.1}, True),
        ({"policy": "random"}, True),
        ({"policy": "random", "relaxation": 0}, False),
        ({"policy": "fly"}, True),
    ],
)
def test_a_server_knows_whether_it_is_lossy(settings, is_lossy):
    assert parsed(**settings).is_lossy is is_lossy


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hidden", AnchorSource("hidden")),
        ("hidden:read", AnchorSource("hidden", reads=True)),
        ("layer:3", AnchorSource("layer", 3)),
        ("layer:12:read", AnchorSource("layer", 12, reads=True)),
        ("value", AnchorSource("value")),
        ("embedding", AnchorSource("embedding", reads=True)),
    ],
)
def test_sources_of_relevance_are_read(text, source):
    assert AnchorSource.parse(text) == source


@pytest.mark.parametrize(
    "text", ["layer:", "layer:1:2", "hidden:", "Hidden", "value:3", "layer:x", "hidden\n", " hidden"]
)
def test_what_is_no_source_is_refused(text):
    with pytest.raises(ValueError, match="must be one of hidden"):
        AnchorSource.parse(text)


def test_the_pages_name_every_setting_with_its_default():
    root = Path(__file__).parents[2]
    pages = "".join((root / page).read_text() for page in ("README.md", "docs/drafting.md", "docs/verification.md"))
    for name, field in LVSpecConfig.model_fields.items():
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        shown = "" if default is None else json.dumps(default)
        rows = re.findall(rf"^\| `{name}` \| ([^|]*) \|", pages, re.MULTILINE)
        assert rows, name
        for row in rows:
            assert name in ("method", "draft_cache_gib") or row.strip("`") in (shown, "–", "by target"), name
