import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vllm_lvspec.draft.pruning import BEST_SHARE, STRATEGIES, VideoView, VisualGrid, best_and_spread, budget, num_best
from vllm_lvspec.draft.pruning.attention import ATTENTION_SHARE

GRIDS = st.builds(
    VisualGrid, st.integers(1, 40), st.integers(1, 20), st.integers(1, 20), num_extra=st.integers(0, 1)
)  # fmt: skip
RATIOS = st.floats(0, 0.99)
SEEDS = st.integers(0, 2**32 - 1)


def view_of(grid: VisualGrid, seed: int = 0, num_levels: int = 1000, scores=None) -> VideoView:
    """All that a strategy may look at; few `num_levels` of scores make many ties."""
    generator = torch.Generator().manual_seed(seed)
    if scores is None:
        scores = torch.randint(0, num_levels, (grid.num_tokens,), generator=generator).float() / num_levels
    return VideoView(grid, seed, torch.randn(grid.num_tokens, 6, generator=generator), scores)


def keep(name: str, view: VideoView, ratio: float) -> list[int]:
    return STRATEGIES[name].keep(view, ratio).tolist()


def has_room_for_a_marker(grid: VisualGrid) -> bool:
    """Uniform keeps a token without a place beside at least one with a place; of two tokens these may be too many."""
    return grid.num_placed > 1 or not grid.num_extra


# All of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@settings(max_examples=60, deadline=None)
@given(GRIDS, RATIOS, SEEDS, st.sampled_from([1, 2, 1000]))
@example(VisualGrid(1, 1, 1), 0.99, 0, 1)
@example(VisualGrid(1, 1, 1), 0.0, 0, 1)
@example(VisualGrid(2, 1, 1, num_extra=1), 0.0, 0, 1000)
@example(VisualGrid(1, 3, 1), 0.99, 0, 1000)
def test_every_strategy_keeps_exactly_its_budget_of_different_tokens_in_order(name, grid, ratio, seed, num_levels):
    assume(has_room_for_a_marker(grid))
    view = view_of(grid, seed, num_levels)
    kept = STRATEGIES[name].keep(view, ratio)
    assert kept.dtype == torch.int64
    assert kept.device.type == "cpu"
    assert torch.equal(kept, kept.unique())  # sorted, and none twice
    assert kept.min() >= 0
    assert kept.max() < grid.num_tokens
    assert len(kept) == (grid.num_tokens if name == "none" else max(1, round((1 - ratio) * grid.num_tokens)))
    assert torch.equal(kept, STRATEGIES[name].keep(view_of(grid, seed, num_levels), ratio))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@settings(deadline=None)
@given(GRIDS, SEEDS)
def test_every_strategy_keeps_everything_at_ratio_zero(name, grid, seed):
    assert keep(name, view_of(grid, seed), 0.0) == list(range(grid.num_tokens))


def test_none_keeps_everything_at_any_ratio():
    assert keep("none", VideoView(VisualGrid(2, 3, 4, num_extra=1)), 0.9) == list(range(25))


@pytest.mark.parametrize("name", ["none", "uniform", "random"])
def test_strategies_that_look_at_the_grid_need_nothing_else(name):
    grid = VisualGrid(4, 3, 5, num_extra=1)
    assert STRATEGIES[name].looks_at == "grid"
    assert keep(name, VideoView(grid, seed=3), 0.5) == keep(name, view_of(grid, seed=3), 0.5)


def test_strategies_say_what_they_look_at_and_who_must_be_asked():
    looks_at = {name: strategy.looks_at for name, strategy in STRATEGIES.items()}
    assert looks_at == {
        "none": "grid", "uniform": "grid", "random": "grid", "redundancy": "embeddings", "attention": "attention",
        "similarity": "similarity",
    }  # fmt: skip
    assert [name for name in sorted(STRATEGIES) if STRATEGIES[name].asks_target] == ["attention", "similarity"]


@pytest.mark.parametrize("name", ["attention", "similarity"])
@settings(deadline=None)
@given(st.integers(1, 200), RATIOS, SEEDS)
def test_what_the_target_says_alone_decides(name, num_tokens, ratio, seed):
    # The grid of an item whose pixels were stripped may be unknown, and the video's seed means nothing.
    view = view_of(VisualGrid(1, 1, num_tokens), seed)
    other = VideoView(VisualGrid(num_tokens, 1, 1), seed + 1, None, view.scores)
    assert keep(name, view, ratio) == keep(name, other, ratio)


@settings(deadline=None)
@given(st.integers(1, 10**6), RATIOS)
def test_a_budget_is_the_rounded_share_and_never_nothing_nor_more_than_there_is(num_tokens, ratio):
    count = budget(num_tokens, ratio)
    assert 1 <= count <= num_tokens
    assert count == 1 or abs(count - (1 - ratio) * num_tokens) <= 0.5


# Best ones, and others spread -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_the_best_are_kept_and_the_rest_are_evenly_spread_over_what_is_left(data):
    num_tokens = data.draw(st.integers(1, 120))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=num_tokens, max_size=num_tokens))).float()
    count = data.draw(st.integers(1, num_tokens))
    num_chosen = data.draw(st.integers(0, count))
    kept = best_and_spread(scores, num_chosen, count).tolist()
    # Python's sort is stable: ties go to the earlier token.
    best = sorted(range(num_tokens), key=lambda i: -float(scores[i]))[:num_chosen]
    assert set(best) <= set(kept)
    assert len(kept) == len(set(kept)) == count
    assert kept == sorted(kept)
    # Of the others, every interval of the order they stand in has its share, give or take one.
    others = [i for i in range(num_tokens) if i not in best]
    ranks = [others.index(i) for i in kept if i not in best]
    for low in range(0, len(others) + 1, 7):
        for high in range(low, len(others) + 1, 7):
            share = len(ranks) * (high - low) / max(len(others), 1)
            assert abs(sum(low <= rank < high for rank in ranks) - share) < 1 + 1e-9


@settings(deadline=None)
@given(st.integers(1, 10**6))
def test_only_a_share_of_what_stays_is_chosen_by_scores(count):
    assert 0 <= num_best(count) <= count
    assert abs(num_best(count) - BEST_SHARE * count) <= 0.5


# Uniform --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_uniform_spreads_over_time_and_space(ratio):
    grid = VisualGrid(32, 16, 16)
    kept = STRATEGIES["uniform"].keep(VideoView(grid), ratio).numpy()
    per_moment = np.bincount(kept // 256, minlength=32)
    assert per_moment.max() - per_moment.min() <= 1
    # Every place is looked at at some time, and no row or column gets more than its share by a half.
    rows, columns = np.bincount(kept % 256 // 16, minlength=16), np.bincount(kept % 16, minlength=16)
    assert len(np.unique(kept % 256)) == 256
    for counts in (rows, columns):
        assert counts.max() <= 1.5 * counts.mean()
        assert counts.min() >= 0.5 * counts.mean()


@settings(deadline=None)
@given(GRIDS, RATIOS)
def test_uniform_keeps_a_marker_where_it_keeps_one_in_two(grid, ratio):
    assume(grid.num_extra)
    has_marker = grid.num_placed in keep("uniform", VideoView(grid), ratio)
    assert has_marker == (2 * budget(grid.num_tokens, ratio) >= grid.num_tokens)


# Random ---------------------------------------------------------------------------------------------------------------


def test_random_draws_differ_between_videos_and_not_between_calls():
    grid = VisualGrid(8, 6, 6)
    draws = {seed: keep("random", VideoView(grid, seed), 0.9) for seed in range(20)}
    assert len({tuple(kept) for kept in draws.values()}) == 20
    torch.manual_seed(5)  # whatever else has been drawn meanwhile
    state = torch.get_rng_state()
    assert {seed: keep("random", VideoView(grid, seed), 0.9) for seed in range(20)} == draws
    assert torch.equal(torch.get_rng_state(), state)


def test_random_favours_no_token():
    grid = VisualGrid(4, 5, 5, num_extra=1)
    draws = 2000
    counts = np.bincount(
        np.concatenate([keep("random", VideoView(grid, seed), 0.8) for seed in range(draws)]), minlength=grid.num_tokens
    )
    share = budget(grid.num_tokens, 0.8) / grid.num_tokens
    assert (np.abs(counts - share * draws) < 5 * np.sqrt(draws * share * (1 - share))).all()


# Attention ------------------------------------------------------------------------------------------------------------


def attended(scores: list[float], ratio: float) -> list[int]:
    return keep("attention", view_of(VisualGrid(1, 1, len(scores)), scores=torch.tensor(scores)), ratio)


def test_stage_one_takes_the_highest_until_they_hold_the_share_and_stage_two_spreads_over_the_others():
    scores = [0.0] * 100
    scores[17], scores[18], scores[60], scores[61] = 3.0, 2.0, 1.0, 4.0  # half of it, 5, is held by 61 and 17
    assert ATTENTION_SHARE == 0.5
    kept = attended(scores, 0.9)
    # Eight others, each from the middle of its eighth of the 98 that are left, whatever they score.
    others = [i for i in range(100) if i not in (17, 61)]
    assert kept == sorted([17, 61, *(others[int((n + 0.5) * 98 / 8)] for n in range(8))])
    assert not {18, 60} & set(kept)
    assert len(kept) == 10


def test_stage_one_stops_as_soon_as_the_share_is_held_exactly():
    # 8 of 16 is half: one token, although the budget's share is two; of seven others the middles of their sevenths.
    scores = [1.0, 8.0, 2.0, *[0.5] * 10, 0.0, 0.0, 0.0]
    others = [i for i in range(16) if i != 1]
    assert num_best(8) == 2
    assert attended(scores, 0.5) == sorted([1, *(others[int((n + 0.5) * 15 / 7)] for n in range(7))])


def test_stage_one_never_takes_more_than_its_share_of_the_budget():
    # Even attention: half of it is held by half of the tokens; ties go to the earlier.
    kept = attended([1.0] * 1000, 0.9)
    assert len(kept) == 100
    assert kept[: num_best(100)] == list(range(num_best(100)))
    assert kept[num_best(100)] > num_best(100)


@settings(max_examples=200, deadline=None)
@given(
    # Whole numbers, so that sums are exact.
    st.lists(st.integers(0, 50), min_size=1, max_size=150),
    RATIOS,
)
def test_the_highest_that_hold_the_share_are_always_kept(scores, ratio):
    kept = attended([float(s) for s in scores], ratio)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    held, best = 0, []
    for i in order:
        best.append(i)
        held += scores[i]
        if 2 * held >= sum(scores):
            break
    count = budget(len(scores), ratio)
    best = best[: num_best(count)]
    # Stage II is blind to scores: what is left of the budget is spread evenly over the others.
    others = [i for i in range(len(scores)) if i not in best]
    m = count - len(best)
    assert kept == sorted(best + [others[int((n + 0.5) * len(others) / m)] for n in range(m)])


def test_a_video_that_nothing_attends_to_is_seen_evenly():
    kept = attended([0.0] * 200, 0.9)
    assert len(kept) == 20
    gaps = np.diff(kept)
    assert gaps.max() <= 12  # the even distance is ten
    assert kept[-1] >= 190


def test_small_attention_counts_as_large_does():
    scores = view_of(VisualGrid(1, 30, 30), seed=4).scores
    assert keep("attention", view_of(VisualGrid(1, 30, 30), scores=scores), 0.9) == keep(
        "attention", view_of(VisualGrid(1, 30, 30), scores=scores * 2.0**-100), 0.9
    )


# Similarity -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 200), RATIOS, SEEDS)
def test_the_most_similar_are_kept_and_the_rest_is_spread(num_tokens, ratio, seed):
    scores = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) * 2 - 1  # cosines may be negative
    kept = keep("similarity", view_of(VisualGrid(1, 1, num_tokens), scores=scores), ratio)
    count = budget(num_tokens, ratio)
    assert kept == best_and_spread(scores, num_best(count), count).tolist()
    assert set(scores.argsort(descending=True)[: num_best(count)].tolist()) <= set(kept)


def test_only_the_order_of_similarities_matters():
    # States share a direction, so that all cosines are nearly one.
    scores = view_of(VisualGrid(1, 20, 20), seed=1, num_levels=100).scores
    near = 0.99 + scores / 128
    assert keep("similarity", view_of(VisualGrid(1, 20, 20), scores=near), 0.9) == keep(
        "similarity", view_of(VisualGrid(1, 20, 20), scores=scores), 0.9
    )


# Redundancy -----------------------------------------------------------------------------------------------------------


def video_of_a_thing_that_moves(num_moments=10, side=8, width=16, noise=0.02, num_extra=0):
    """A still background, and a thing of one token that goes along the diagonal; its places `[num_moments]`."""
    generator = torch.Generator().manual_seed(0)
    background, thing = torch.eye(width)[:2] * 5
    frames = background.repeat(num_moments, side * side, 1)
    frames = frames + noise * torch.randn(frames.shape, generator=generator)
    places = [(t % side) * side + t % side for t in range(num_moments)]
    for moment, place in enumerate(places):
        frames[moment, place] = thing
    extra = torch.randn(num_extra, width, generator=generator) * 100
    view = VideoView(VisualGrid(num_moments, side, side, num_extra), 0, torch.cat([frames.flatten(0, 1), extra]))
    return view, [t * side * side + place for t, place in enumerate(places)]


@pytest.mark.parametrize("num_extra", [0, 1])
def test_a_small_thing_that_moves_is_kept_and_the_still_background_is_only_sampled(num_extra):
    view, things = video_of_a_thing_that_moves(num_moments=8, side=10, num_extra=num_extra)
    kept = keep("redundancy", view, 0.9)
    # Nothing was before the first moment, so that only what is odd in it says something.
    assert set(things[1:]) <= set(kept)
    # Things, and what they uncover, come first; what is left of the budget is spread over whatever there is.
    uncovered = {place + 100 for place in things[:-1]}
    assert uncovered <= set(kept)
    num_still = len(set(kept) - set(things) - uncovered)
    assert num_still <= len(kept) - len(things[1:]) - len(uncovered) < 0.09 * view.grid.num_placed
    by_place = keep("uniform", view, 0.9)
    assert len(by_place) == len(kept)
    assert len(set(things) & set(by_place)) < len(things) // 2


def test_what_stands_out_in_a_still_video_is_kept():
    # Nothing moves, so that there is no novelty; one thing is unlike its surroundings.
    embeddings = torch.ones(6, 25, 4)
    embeddings[:, 7] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    view = VideoView(VisualGrid(6, 5, 5), 0, embeddings.flatten(0, 1))
    kept = keep("redundancy", view, 0.8)
    assert num_best(30) >= 6
    assert {moment * 25 + 7 for moment in range(6)} <= set(kept)
    assert len(kept) == 30


def test_a_cut_is_new_everywhere_at_its_moment_only():
    generator = torch.Generator().manual_seed(1)
    scenes = torch.zeros(2, 36, 32)
    scenes[0, :, :16], scenes[1, :, 16:] = torch.rand(2, 36, 16, generator=generator)  # at right angles
    embeddings = torch.cat([scenes[:1].repeat(5, 1, 1), scenes[1:].repeat(5, 1, 1)])
    kept = keep("redundancy", VideoView(VisualGrid(10, 6, 6), 0, embeddings.flatten(0, 1)), 0.5)
    moments = np.bincount(np.array(kept) // 36, minlength=10)
    # What is chosen by scores is enough for the whole first picture of the other scene.
    assert num_best(180) >= 36
    assert moments[5] == 36
    assert np.delete(moments, 5).max() <= 24


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_length_and_precision_of_embeddings_do_not_matter(scale):
    view, _ = video_of_a_thing_that_moves()
    lengths = torch.rand(view.grid.num_tokens, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    kept = keep("redundancy", view, 0.9)
    assert keep("redundancy", VideoView(view.grid, 0, view.embeddings * lengths * scale), 0.9) == kept
    exact = VideoView(view.grid, 0, view.embeddings.bfloat16().float())
    assert keep("redundancy", VideoView(view.grid, 0, view.embeddings.bfloat16()), 0.9) == keep(
        "redundancy", exact, 0.9
    )


def test_tokens_without_a_place_are_never_the_most_novel():
    view, _ = video_of_a_thing_that_moves(num_extra=1)
    # Its embedding is unlike any other, but it is nobody's neighbour in time or space.
    assert view.grid.num_placed not in keep("redundancy", view, 0.9)
    assert view.grid.num_placed in keep("redundancy", view, 0.0)


def test_embeddings_that_are_all_zero_still_give_a_view():
    grid = VisualGrid(5, 4, 4, num_extra=1)
    assert len(keep("redundancy", VideoView(grid, 0, torch.zeros(81, 8)), 0.9)) == 8
