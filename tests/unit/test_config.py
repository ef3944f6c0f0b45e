import pytest

from vllm_lvspec.config import LVSpecConfig, LVSpecConfigError, names_lvspec


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
        ({"pruning": "magic"}, ['pruning="magic"', "none, uniform"]),
        ({"policy": "loose"}, ['policy="loose"', "strict"]),
        ({"model": ""}, ['model=""', "at least 1 character"]),
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
