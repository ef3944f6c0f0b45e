"""The verifier against the rules of acceptance, written out for one request in plain Python."""

import math
import random
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings

from vllm_lvspec.config import LVSpecConfig
from vllm_lvspec.kernels.acceptance import END, EXACT, LOOSE, NEGATION, NUMBER, ORDER, SHIFT, SPECIAL, TARGET
from vllm_lvspec.kernels.relevance import VisualPages
from vllm_lvspec.verify.features import FeatureCache, Layout, Projection, num_shares, tag_of
from vllm_lvspec.verify.policies import POLICIES, Evidence
from vllm_lvspec.verify.rules import RequestRules
from vllm_lvspec.verify.verifier import NUM_BINS, Choices, Verifier

EOS, MARK, NOT, TWO, THEN = range(5)
STOP, A, B, C, D = range(5, 10)
VOCABULARY = 10
KIND = {EOS: END | SPECIAL, MARK: SPECIAL, NOT: NEGATION, TWO: NUMBER, THEN: ORDER}
KINDS = torch.tensor([KIND.get(token, 0) for token in range(VOCABULARY)], dtype=torch.uint8)
GUARDED = {"negation": NOT, "number": TWO, "order": THEN}
NOTHING, NAN = -math.inf, math.nan
EVERYTHING_LOOSE = RequestRules("lvspec", 1.0)
PLAIN = LVSpecConfig(guards=(), probability_floor=0.0, shift_window=0)


@dataclass(frozen=True)
class Case:
    """One request in one step. `logits` has a row for each drafted token, `target` one more token: the bonus."""

    rules: RequestRules
    draft: list[int]
    target: list[int]
    exact: list[bool]
    logits: list[list[float]]
    relevance: list[float]
    place: int = 100


def greedy(rules, draft, target, relevance=None, other=-1.0, place=100):
    """A case where the target's best tokens are `target`, and every other one is less likely by `other`."""
    logits = [[0.0 if token == best else other for token in range(VOCABULARY)] for best in target[:-1]]
    exact = [d == t for d, t in zip(draft, target, strict=False)]
    return Case(rules, draft, target, exact, logits, relevance or [0.5] * len(draft), place)


def verify(config, cases, verifier=None):
    """For every case what is emitted: tokens, reasons, and the choices that shifts rest on."""
    rows = [row for case in cases for row in case.logits]
    counts = [len(case.draft) for case in cases]

    def flat(name, dtype):
        return torch.tensor([x for case in cases for x in getattr(case, name)[: len(case.draft)]], dtype=dtype)

    choices = Choices(
        draft_ids=flat("draft", torch.int32),
        target_ids=flat("target", torch.int32),
        bonus_ids=torch.tensor([case.target[-1] for case in cases], dtype=torch.int32),
        starts=torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32),
        exact=flat("exact", torch.bool),
        logits=torch.tensor(rows, dtype=torch.float32).view(len(rows), VOCABULARY),
        places=torch.tensor([case.place + i for case in cases for i in range(len(case.draft))], dtype=torch.int64),
    )
    verifier = verifier or Verifier(config, KINDS)
    accepted = verifier.verify(choices, [case.rules for case in cases], max(counts), flat("relevance", torch.float32))
    emitted = []
    for tokens, reasons, sources in zip(
        accepted.token_ids.tolist(), accepted.reasons.tolist(), accepted.sources.tolist(), strict=True
    ):
        rows = list(zip(tokens, reasons, sources, strict=True))
        n = reasons.index(0) if 0 in reasons else len(reasons)
        assert all(row == (-1, 0, -1) for row in rows[n:])
        emitted.append(rows[:n])
    return emitted


def tokens_of(row):
    return [token for token, _, _ in row]


def reasons_of(row):
    return [reason for _, reason, _ in row]


def ends_of(case):
    return {*case.rules.stop_ids, *([EOS] if case.rules.ends else [])}


def chain_length(case):
    for i, token in enumerate(case.draft):
        if token < 0:
            return i
        if token in ends_of(case):
            return i + 1
    return len(case.draft)


def top_entropy(row):
    total = sum(math.exp(x) for x in row)
    best = sorted((math.exp(x) / total for x in row), reverse=True)[:3]
    return -sum(p * math.log(p) for p in best if p > 0)


def blind_scores(places):
    nothing = torch.zeros(0)
    evidence = Evidence(nothing, nothing, nothing, nothing, torch.tensor(places, dtype=torch.int64))
    return POLICIES["random"].score(evidence, PLAIN).tolist()


def anchors_of(case, config, k):
    """Rule 2, for each policy."""
    policy, relaxation = case.rules.policy, case.rules.relaxation
    if policy == "strict":
        return set(range(k))
    if policy == "fly":
        asked = range(1, config.fly_window + 1)
        undecided = [top_entropy(case.logits[i]) >= config.fly_entropy for i in range(k)]
        return {
            i
            for i in range(k)
            if not (undecided[i] and all(i + m < len(case.draft) and case.exact[i + m] for m in asked))
        }
    score = case.relevance
    if policy == "random":
        score = blind_scores([case.place + i for i in range(k)])
    score = [math.inf if math.isnan(score[i]) else score[i] for i in range(k)]
    num_anchors = k - math.floor(relaxation * k + 1e-9)
    anchors = {i for i in range(k) if sum(other > score[i] for other in score) < num_anchors}
    anchors |= {i for i in range(k) if score[i] == math.inf}
    if policy == "lvspec" and config.anchor_threshold is not None:
        anchors |= {i for i in range(k) if score[i] >= config.anchor_threshold}
    return anchors


def free_places(case, config, k):
    """Rule 3. Where a request is verified as FLy does it, our own guards and floor are not asked."""
    is_fly = case.rules.policy == "fly"
    never = {EOS, MARK, *case.rules.stop_ids}
    if not is_fly:
        never |= {GUARDED[name] for name in config.guards}
    floor = 0.0 if is_fly else config.probability_floor
    free = set()
    for i in range(k):
        share = math.exp(case.logits[i][case.draft[i]] - max(case.logits[i]))
        if case.draft[i] not in never and case.target[i] not in never and share > 0 and share >= floor:
            free.add(i)
    return free


def shifts_of(case, config, k, candidates):
    """Rule 5: which choice of the target each of `candidates` takes."""
    unused = {j for j in range(k) if not case.exact[j]}
    taken = {}
    for i in sorted(candidates):
        # The nearest first, of two as near the one before.
        for j in sorted(unused, key=lambda j: (abs(j - i), j)):
            near = 0 < abs(j - i) <= config.shift_window and (j < i or config.shift_direction == "both")
            way = range(min(i, j), max(i, j) + 1)
            blocked = "order" in config.guards and any(THEN in (case.draft[m], case.target[m]) for m in way)
            if near and not blocked and case.target[j] == case.draft[i]:
                taken[i] = j
                unused.remove(j)
                break
    return taken


def by_the_rules(case, config):
    """What the rules have `case` emit: (token, reason, source) in order."""
    k = chain_length(case)
    anchors, free = anchors_of(case, config, k), free_places(case, config, k)
    exact = {i for i in range(k) if case.exact[i]}
    loose = free - anchors - exact
    may_shift = case.rules.policy in ("lvspec", "random") and case.rules.relaxation > 0
    shift = shifts_of(case, config, k, (anchors & free) - exact) if may_shift else {}
    while True:
        n = 0
        while n < k and (n in exact or n in loose or n in shift):
            n += 1
        holding = {i: j for i, j in shift.items() if j < n}
        if holding == shift:
            break
        shift = holding
    emitted = []
    for i in range(n):
        if i in exact:
            emitted.append((case.draft[i], EXACT, -1))
        elif i in loose:
            emitted.append((case.draft[i], LOOSE, -1))
        else:
            emitted.append((case.draft[i], SHIFT, shift[i]))
    if n == 0 or case.draft[n - 1] not in ends_of(case):
        emitted.append((case.target[n], TARGET, -1))
    return emitted


@st.composite
def configs(draw):
    return LVSpecConfig(
        probability_floor=draw(st.sampled_from([0.0, 0.3, 0.5])),
        shift_window=draw(st.sampled_from([0, 1, 2, 5])),
        shift_direction=draw(st.sampled_from(["both", "back"])),
        guards=draw(st.sampled_from([(), ("negation",), ("order",), ("negation", "number", "order")])),
        anchor_threshold=draw(st.sampled_from([None, None, 0.5])),
        fly_window=draw(st.integers(0, 3)),
        fly_entropy=draw(st.sampled_from([0.0, 0.4, 0.8])),
    )


@st.composite
def cases(draw, policies=("strict", "lvspec", "fly", "random"), max_drafted=9):
    policy = draw(st.sampled_from(policies))
    relaxation = 0.0 if policy == "strict" else draw(st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0]))
    if policy == "fly":
        relaxation = 0.8
    stop_ids = draw(st.sampled_from([(), (), (STOP,), (STOP, D, -1)]))
    rules = RequestRules(policy, relaxation, tuple(i for i in stop_ids if i >= 0), ends=draw(st.booleans()))
    k = draw(st.integers(0, max_drafted))
    rng = random.Random(draw(st.integers(0, 2**32)))

    def token():
        return rng.choice([A, B, C, D] if rng.random() < 0.85 else range(VOCABULARY))

    target = [token() for _ in range(k + 1)]
    draft = [target[i] if rng.random() < 0.7 else token() for i in range(k)]
    for _ in range(rng.randint(0, 2) if k > 1 else 0):  # what the drafter says in another order
        i = rng.randrange(k - 1)
        j = min(i + rng.choice([1, 1, 2, 3]), k - 1)
        draft[i], draft[j] = draft[j], draft[i]
    logits = [[rng.choice([NOTHING, -4.0, -1.0, -0.5]) for _ in range(VOCABULARY)] for _ in range(k)]
    for i in range(k):
        if rng.random() < 0.8:
            logits[i][draft[i]] = rng.choice([-1.0, -0.5])
        logits[i][target[i]] = 0.0
    exact = [draft[i] == target[i] for i in range(k)]
    if (
        draw(st.integers(0, 2)) == 0
    ):  # sampling: the drafted token may pass where it isn't the likeliest, or fail where it is
        for i in range(k):
            exact[i] = logits[i][draft[i]] > NOTHING and rng.random() < 0.6
            others = [x for x in range(VOCABULARY) if x != draft[i] and logits[i][x] > NOTHING]
            target[i] = draft[i] if exact[i] or not others else rng.choice(others)
            exact[i] |= not others
    if draw(st.integers(0, 3)) == 0:
        cut = rng.randint(0, k)
        draft[cut:], exact[cut:] = [-1] * (k - cut), [False] * (k - cut)
    relevance = [rng.choice([-0.25, 0.0, 0.25, 0.5, 0.75, NAN, rng.random()]) for _ in range(k)]
    return Case(rules, draft, target, exact, logits, relevance, place=draw(st.integers(0, 5000)))


def decided(config, batch):
    """Not within rounding of FLy's threshold."""
    rows = [row for case in batch for row in case.logits]
    return all(config.fly_entropy == 0 or abs(top_entropy(row) - config.fly_entropy) > 1e-4 for row in rows)


@given(configs(), st.lists(cases(), min_size=1, max_size=6))
@settings(max_examples=500, deadline=None)
def test_every_request_of_a_mixed_batch_follows_the_rules_of_its_own_policy(config, batch):
    assume(decided(config, batch))
    assert verify(config, batch) == [by_the_rules(case, config) for case in batch]


@given(configs(), st.lists(cases(), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_what_is_emitted_is_possible_and_never_runs_past_the_targets_own_end(config, batch):
    for case, row in zip(batch, verify(config, batch), strict=True):
        assert row
        assert not set(tokens_of(row)[:-1]) & ends_of(case)
        for i, (token, reason, source) in enumerate(row):
            if i < len(case.logits):
                assert case.logits[i][token] > NOTHING
            if reason in (LOOSE, SHIFT):
                never = {EOS, MARK, *case.rules.stop_ids}
                assert token not in never and case.target[i] not in never
            assert (source >= 0) == (reason == SHIFT)
            if reason == SHIFT:
                assert case.target[source] == token
                assert row[source][1] not in (EXACT, TARGET)
        sources = [source for _, reason, source in row if reason == SHIFT]
        assert len(sources) == len(set(sources))


@given(configs(), st.lists(cases(policies=("strict", "strict", "lvspec", "fly", "random")), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_strict_requests_get_the_exact_prefix_and_the_targets_token_whatever_is_beside_them(config, batch):
    for case, row in zip(batch, verify(config, batch), strict=True):
        if case.rules.policy == "strict":
            n = 0
            while n < chain_length(case) and case.exact[n]:
                n += 1
            ended = n > 0 and case.draft[n - 1] in ends_of(case)
            assert tokens_of(row) == case.target[: n if ended else n + 1]
            assert reasons_of(row) == [EXACT] * n + [TARGET] * (not ended)


@given(configs(), st.lists(cases(policies=("lvspec", "random")), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_relaxation_of_0_is_strict(config, batch):
    unrelaxed = [replace(case, rules=replace(case.rules, relaxation=0.0)) for case in batch]
    strict = [replace(case, rules=case.rules.as_strict()) for case in batch]
    assert verify(config, unrelaxed) == verify(config, strict)


@given(configs(), st.lists(cases(), min_size=2, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_order_of_requests_does_not_matter(config, batch, rng):
    order = rng.sample(range(len(batch)), len(batch))
    there = verify(config, batch)
    assert verify(config, [batch[i] for i in order]) == [there[i] for i in order]


@given(configs(), st.lists(cases(), min_size=1, max_size=4), st.lists(cases(), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_what_was_verified_before_does_not_matter(config, batch, other):
    verifier = Verifier(config, KINDS)
    once = verify(config, batch, verifier)
    verify(config, other, verifier)
    assert verify(config, batch, verifier) == once == verify(config, batch)


@pytest.mark.parametrize("policies", [["strict"], ["lvspec"], ["fly"], ["random"], ["strict", "lvspec", "fly"]])
def test_a_request_without_drafted_tokens_gets_the_targets_token(policies):
    batch = [greedy(RequestRules(policy, 0.7), [], [A]) for policy in policies]
    assert verify(LVSpecConfig(), batch) == [[(A, TARGET, -1)]] * len(policies)


def test_an_empty_chain_between_others_takes_nothing_from_them():
    batch = [
        greedy(EVERYTHING_LOOSE, [A, B], [A, C, D]),
        greedy(EVERYTHING_LOOSE, [], [B]),
        greedy(RequestRules(), [A, B], [A, C, D]),
    ]
    assert [tokens_of(row) for row in verify(PLAIN, batch)] == [[A, B, D], [B], [A, C]]


def test_without_relevance_every_token_is_an_anchor():
    draft, logits = torch.tensor([A, B], dtype=torch.int32), torch.zeros(2, VOCABULARY)
    choices = Choices(
        draft_ids=draft,
        target_ids=draft.flip(0),
        bonus_ids=draft[:1],
        starts=torch.tensor([0, 2], dtype=torch.int32),
        exact=torch.zeros(2, dtype=torch.bool),
        logits=logits,
        places=torch.arange(2),
    )
    accepted = Verifier(PLAIN, KINDS).verify(choices, [EVERYTHING_LOOSE], 2, None)
    assert accepted.token_ids.tolist() == [[B, -1, -1]]


def test_seven_tenths_of_ten_leave_three_anchors():
    relevance = [0.1 * i for i in range(10)]
    case = greedy(RequestRules("lvspec", 0.7), [A] * 10, [B] * 11, relevance)
    assert reasons_of(verify(PLAIN, [case])[0]) == [LOOSE] * 7 + [TARGET]


def test_ties_and_what_has_no_relevance_are_anchors():
    for relevance, num_loose in (([0.1, 0.5, 0.5, 0.2], 1), ([0.1, 0.2, 0.3, 0.3], 2), ([0.1, NAN, 0.2, 0.3], 1)):
        case = greedy(RequestRules("lvspec", 0.75), [A] * 4, [B] * 5, relevance)
        assert reasons_of(verify(PLAIN, [case])[0]) == [LOOSE] * num_loose + [TARGET]


def test_a_threshold_makes_anchors_of_relevant_tokens_whatever_their_rank():
    config = LVSpecConfig(probability_floor=0.0, shift_window=0, anchor_threshold=0.4)
    case = greedy(EVERYTHING_LOOSE, [A] * 3, [B] * 4, [0.1, 0.39, 0.4])
    assert reasons_of(verify(config, [case])[0]) == [LOOSE, LOOSE, TARGET]


@pytest.mark.parametrize(("other", "num_loose"), [(math.log(0.31), 1), (math.log(0.29), 0)])
def test_the_probability_floor_is_a_share_of_the_best_tokens_probability(other, num_loose):
    config = LVSpecConfig(probability_floor=0.3, shift_window=0)
    assert (
        reasons_of(verify(config, [greedy(EVERYTHING_LOOSE, [A], [B, C], other=other)])[0])[:-1] == [LOOSE] * num_loose
    )


@pytest.mark.parametrize("policy", ["lvspec", "fly", "random"])
@pytest.mark.parametrize(
    ("draft", "target", "stop_ids"), [(EOS, A, ()), (A, EOS, ()), (MARK, A, ()), (A, MARK, ()), (A, D, (D,))]
)
@pytest.mark.parametrize("ends", [True, False])
def test_ends_and_special_tokens_are_neither_emitted_nor_passed_over_loosely(policy, draft, target, stop_ids, ends):
    config = LVSpecConfig(probability_floor=0.0, fly_window=1, fly_entropy=0.0, shift_window=3)
    rules = RequestRules(policy, 1.0, stop_ids, ends)
    assert verify(config, [greedy(rules, [draft, B], [target, B, C])]) == [[(target, TARGET, -1)]]


def test_under_ignore_eos_a_drafted_end_that_the_target_chooses_too_does_not_end_the_chain():
    for ends, wanted in ((True, [A, EOS]), (False, [A, EOS, B, C])):
        case = greedy(replace(EVERYTHING_LOOSE, ends=ends), [A, EOS, B], [A, EOS, B, C])
        assert tokens_of(verify(PLAIN, [case])[0]) == wanted


@pytest.mark.parametrize("word", GUARDED)
def test_guarded_words_are_neither_lost_nor_put_in_loosely(word):
    guarded = LVSpecConfig(probability_floor=0.0, guards=(word,))
    for draft, target in ((GUARDED[word], A), (A, GUARDED[word])):
        case = greedy(EVERYTHING_LOOSE, [draft], [target, B])
        assert tokens_of(verify(guarded, [case])[0]) == [target]
        assert tokens_of(verify(PLAIN, [case])[0]) == [draft, B]


def test_shifts_go_both_ways_or_back_only_and_not_over_order_words():
    # Place 1 is a filler, the others are anchors that the target chose at the other's place.
    rules, relevance = RequestRules("lvspec", 0.4), [0.9, 0.1, 0.9]
    case = greedy(rules, [A, C, B], [B, C, A, D], relevance)
    there = replace(case, draft=[A, THEN, B], target=[B, THEN, A, D])
    for settings_, wanted in (({}, [A, C, B, D]), ({"shift_window": 1}, [B]), ({"shift_direction": "back"}, [B])):
        assert tokens_of(verify(LVSpecConfig(probability_floor=0.0, **settings_), [case])[0]) == wanted
    for guards, wanted in (((), [A, THEN, B, D]), (("order",), [B])):
        assert tokens_of(verify(LVSpecConfig(probability_floor=0.0, guards=guards), [there])[0]) == wanted


def test_padding_ends_the_chain_and_the_target_goes_on_there():
    case = greedy(EVERYTHING_LOOSE, [A, B, -1, -1], [A, C, D, B, A])
    assert verify(PLAIN, [case]) == [[(A, EXACT, -1), (B, LOOSE, -1), (D, TARGET, -1)]]


# FLy


def undecided(*tokens):
    """Logits of a target to whom `tokens` are all the same, the first a little better."""
    return [-0.01 * tokens.index(x) if x in tokens else -20.0 for x in range(VOCABULARY)]


def fly(draft, target, logits=None, **rules):
    case = greedy(RequestRules("fly", 0.8, **rules), draft, target)
    return case if logits is None else replace(case, logits=logits)


FLY = LVSpecConfig(fly_window=2, fly_entropy=0.3)


@given(st.lists(cases(policies=("fly",), max_drafted=12), min_size=1, max_size=4), configs())
@settings(max_examples=250, deadline=None)
def test_fly_passes_a_miss_where_the_target_is_undecided_and_the_window_behind_it_is_right(batch, config):
    assume(decided(config, batch))
    for case, row in zip(batch, verify(config, batch), strict=True):
        k, never = chain_length(case), {EOS, MARK, *case.rules.stop_ids}
        for i in range(min(k, len(row))):
            window = range(i + 1, i + 1 + config.fly_window)
            passes = (
                top_entropy(case.logits[i]) >= config.fly_entropy
                and all(j < len(case.draft) and case.exact[j] for j in window)
                and not {case.draft[i], case.target[i]} & never
                and case.logits[i][case.draft[i]] > NOTHING
            )
            assert row[i][1] == (EXACT if case.exact[i] else LOOSE if passes else TARGET)


def test_fly_asks_for_the_entropy_of_three_tokens_whose_probabilities_are_not_normalised():
    # Ten tokens alike: 3 * 0.1 * ln 10 = 0.69; normalised it would be ln 3 = 1.1.
    even = [[0.0] * VOCABULARY] * 3
    for threshold, num_emitted in ((0.68, 4), (0.7, 1)):
        config = LVSpecConfig(fly_window=2, fly_entropy=threshold)
        assert len(verify(config, [fly([B, B, C], [A, B, C, D], even)])[0]) == num_emitted
    # Two alike: ln 2 = 0.69.
    for threshold, num_emitted in ((0.68, 4), (0.71, 1)):
        config = LVSpecConfig(fly_window=2, fly_entropy=threshold)
        assert len(verify(config, [fly([B, B, C], [A, B, C, D], [undecided(A, B)] * 3)])[0]) == num_emitted


@pytest.mark.parametrize(
    ("draft", "wanted"),
    [
        ([B, B, C, D], [B, B, C, D, A]),  # window right
        ([B, B, D, D], [A]),  # second of the window wrong
        ([A, D, C, D], [A, D, C, D, A]),
        ([A, B, A, D], [A, B, C]),  # only one drafted token behind it
        ([A, B, C, A], [A, B, C, D]),
        ([B, B, C], [B, B, C, D]),
        ([B, B], [A]),
        ([B, B, -1, -1], [A]),
        ([B, B, C, -1], [B, B, C, D]),
    ],
)
def test_fly_needs_a_whole_window_of_drafted_tokens_behind_a_miss(draft, wanted):
    target = [A, B, C, D, A][: len(draft) + 1] if len(draft) > 2 else [A, B, D]
    logits = [undecided(A, B, C, D)] * len(draft)
    assert tokens_of(verify(FLY, [fly(draft, target, logits)])[0]) == wanted


def test_fly_counts_what_was_drafted_behind_an_end_as_vllm_does():
    logits = [undecided(A, B, C)] * 3
    assert tokens_of(verify(FLY, [fly([B, EOS, C], [A, EOS, C, D], logits)])[0]) == [B, EOS]
    assert tokens_of(verify(FLY, [fly([B, EOS, C], [A, EOS, C, D], logits, ends=False)])[0]) == [B, EOS, C, D]


def test_a_window_does_not_reach_into_the_next_request():
    logits = [undecided(A, B)] * 2
    batch = [fly([B, B], [A, B, C], logits), fly([C, C], [C, C, D], logits)]
    assert [tokens_of(row) for row in verify(FLY, batch)] == [[A], [C, C, D]]


# Random


@pytest.mark.parametrize("relaxation", [0.3, 0.5, 0.7, 0.8])
@pytest.mark.parametrize("num_drafted", [1, 5, 10, 13])
def test_random_has_as_many_fillers_as_lvspec_would_have(relaxation, num_drafted):
    config = LVSpecConfig(probability_floor=0.0, shift_window=0)
    wanted = math.floor(relaxation * num_drafted + 1e-9)
    for place in (0, 17, 30000):
        num_fillers = 0
        for i in range(num_drafted):  # all but one are the target's choice, so that the chain goes on behind it
            draft = [B if j == i else A for j in range(num_drafted)]
            case = greedy(RequestRules("random", relaxation), draft, [A] * (num_drafted + 1), place=place)
            num_fillers += len(verify(config, [case])[0]) == num_drafted + 1
        assert num_fillers == wanted


def test_random_decides_alike_at_the_same_place_and_otherwise_elsewhere():
    def fillers(place):
        case = greedy(RequestRules("random", 0.7), [B] * 10, [A] * 11, place=place)
        return len(verify(PLAIN, [case])[0])

    assert [fillers(place) for place in range(200)] == [fillers(place) for place in range(200)]
    assert len({fillers(place) for place in range(200)}) >= 5
    scores = blind_scores(list(range(4000)))
    assert len(set(scores)) >= 3990
    assert 0 <= min(scores) < 0.01 < 0.99 < max(scores) < 1
    assert all(0.3 < sum(scores[i : i + 100]) / 100 < 0.7 for i in range(0, 4000, 100))
    assert sum(0 <= score < 0.3 for score in scores) / 4000 == pytest.approx(0.3, abs=0.03)


def test_random_does_not_look_at_relevance():
    case = greedy(RequestRules("random", 0.7), [B] * 10, [A] * 11)
    blind = replace(case, relevance=[NAN] * 10)
    assert verify(PLAIN, [case]) == verify(PLAIN, [blind])


# Relevance and features

WIDTH, BLOCK = 48, 12
TABLES = [np.array([7, 2, 5], dtype=np.int32), np.array([1, 9, 3], dtype=np.int32)]
VISUAL = [np.array([0, 3, 4, 11, 12, 13, 20, 25, 35]), np.arange(5, 30)]
NUM_DRAFTED = [4, 3]
STARTS = torch.tensor([0, 4, 7], dtype=torch.int32)


def some_states(count, seed, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def some_relevance(num_ranks, projection=None, top_n=5, dtype=torch.float32):
    """Each rank's relevance, where ranks hold their shares of all requests' features and tell each other."""
    project = projection or (lambda states: states)
    queries = project(some_states(sum(NUM_DRAFTED), seed=9))
    found = []
    for rank in range(num_ranks):
        cache = FeatureCache(Layout(10, BLOCK, queries.shape[1], rank, num_ranks), dtype, torch.device("cpu"))
        own = []
        for r, (table, positions) in enumerate(zip(TABLES, VISUAL, strict=True)):
            states = project(some_states(len(positions), seed=r))
            mine = cache.layout.own(positions)
            held = positions[mine]
            blocks, slots = torch.from_numpy(table[held // BLOCK]).long(), held % BLOCK // num_ranks
            cache.write(states[torch.from_numpy(mine)], blocks, torch.from_numpy(slots))
            own.append(held // num_ranks)
        counts = torch.tensor([len(x) for x in own])
        pages = VisualPages(
            cache.features,
            torch.from_numpy(np.stack(TABLES)),
            torch.from_numpy(np.concatenate(own)).int(),
            F.pad(counts.cumsum(0), (1, 0)).int(),
        )
        found.append((queries, pages))
    config = LVSpecConfig(anchor_top_n=top_n)
    tops = []
    for queries, pages in found:
        Verifier(config, KINDS, gather=lambda x: tops.append(x) or x).relevance(queries, STARTS, pages, 4)
    joined = torch.cat(tops)
    return [
        Verifier(config, KINDS, gather=lambda _: joined).relevance(queries, STARTS, pages, 4)
        for queries, pages in found
    ]


@pytest.mark.parametrize("top_n", [1, 5, 20])
@pytest.mark.parametrize("reduced", [None, 32])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_share_features_find_the_same_relevance_as_one_alone(num_ranks, reduced, top_n):
    projection = reduced and Projection(WIDTH, reduced, torch.float32, torch.device("cpu"))
    (alone,) = some_relevance(1, projection, top_n)
    together = some_relevance(num_ranks, projection, top_n)
    for relevance in together:
        assert torch.equal(relevance, together[0])
        assert torch.allclose(relevance, alone, atol=1e-6)


def test_relevance_is_the_mean_of_the_largest_cosines_with_what_the_request_sees():
    (found,) = some_relevance(1, top_n=5)
    queries = some_states(sum(NUM_DRAFTED), seed=9)
    for q in range(7):
        r = int(q >= NUM_DRAFTED[0])
        cosines = F.cosine_similarity(queries[q], some_states(len(VISUAL[r]), seed=r), dim=1)
        assert float(found[q]) == pytest.approx(sum(sorted(cosines.tolist())[-5:]) / 5, abs=1e-6)


def test_features_kept_in_bfloat16_give_nearly_the_same_relevance():
    (exact,), (rounded,) = some_relevance(1), some_relevance(1, dtype=torch.bfloat16)
    assert torch.allclose(exact, rounded, atol=0.01)


def test_relevance_is_counted_in_bins_and_apart_where_there_is_none():
    cache = FeatureCache(Layout(2, 4, 2), torch.float32, torch.device("cpu"))
    states = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    cache.write(states[:1], torch.tensor([1]), torch.tensor([2]))
    positions, starts = torch.tensor([2], dtype=torch.int32), torch.tensor([0, 1, 1], dtype=torch.int32)
    pages = VisualPages(cache.features, torch.tensor([[1], [0]], dtype=torch.int32), positions, starts)
    verifier = Verifier(LVSpecConfig(), KINDS)
    queries = torch.cat([states, -states[:1], states])
    for _ in range(2):
        found = verifier.relevance(queries, torch.tensor([0, 3, 5], dtype=torch.int32), pages, 3)
    assert found.tolist()[:3] == [1.0, 0.0, -1.0]
    assert found.isnan().tolist() == [False] * 3 + [True] * 2
    counts = verifier.relevance_counts
    assert len(counts) == NUM_BINS + 1
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == {0: 2, NUM_BINS // 2: 2, NUM_BINS - 1: 2, NUM_BINS: 4}


def test_warming_up_runs_chains_of_all_lengths_and_counts_nothing(monkeypatch):
    verifier = Verifier(LVSpecConfig(num_speculative_tokens=10), KINDS)
    lengths = []
    verify = verifier.verify
    monkeypatch.setattr(verifier, "verify", lambda *args: lengths.append(args[2]) or verify(*args))
    each = torch.tensor([0, 1], dtype=torch.int32)
    pages = VisualPages(torch.zeros(2, 4, 1, 8), torch.zeros(1, 2, dtype=torch.int32), each[:1], each)
    verifier.warm_up(pages)
    assert lengths == [1, 3, 7, 10]  # 16 threads verify 10 tokens and the target's, 8, 4 and 2 those before
    assert int(verifier.relevance_counts.sum()) == 0
    verifier.warm_up(None)
    assert lengths[4:] == [1, 3, 7, 10]


def test_ranks_share_a_block_evenly_or_each_hold_all_of_it():
    assert [num_shares(16, ranks) for ranks in (1, 2, 3, 4, 16, 32)] == [1, 2, 1, 4, 16, 1]
    layouts = [Layout(10, 16, WIDTH, rank, 4) for rank in range(4)]
    held = np.stack([layout.own(np.arange(64)) for layout in layouts])
    assert (held.sum(0) == 1).all()
    assert [layout.slots_per_block for layout in layouts] == [4] * 4
    assert layouts[0].bytes_per_block(torch.bfloat16) == 4 * WIDTH * 2
    cache = FeatureCache(layouts[1], torch.bfloat16, torch.device("cpu"))
    assert cache.num_bytes == 10 * layouts[1].bytes_per_block(torch.bfloat16)


def test_projection_is_the_same_everywhere_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = Projection(64, 16, torch.float32, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    second = Projection(64, 16, torch.float32, torch.device("cpu"))
    states = some_states(5, seed=1, width=64)
    assert torch.equal(first(states), second(states))
    assert first(states).shape == (5, 16)


@pytest.mark.parametrize("reduced", [128, 512])
def test_projection_keeps_cosines_nearly(reduced):
    common = some_states(1, seed=0, width=1024)
    states = some_states(60, seed=1, width=1024) + torch.linspace(0, 3, 60)[:, None] * common
    projected = Projection(1024, reduced, torch.float32, torch.device("cpu"))(states)
    before, after = (F.normalize(x) @ F.normalize(x).T for x in (states, projected))
    errors = (before - after).abs()
    assert errors.mean() < 1 / reduced**0.5
    assert errors.max() < 5 / reduced**0.5
    assert torch.allclose(projected.norm(dim=1), states.norm(dim=1), rtol=5 / reduced**0.5)


class TestTags:
    """Which items the features in a block are of; request with blocks 4, 1, 6 of 8 tokens, two items."""

    table, positions = np.array([4, 1, 6]), np.array([2, 3, 7, 8, 15, 16, 23])
    tags = np.array([tag_of("a")] * 4 + [tag_of("b")] * 3)

    @pytest.fixture
    def cache(self):
        cache = FeatureCache(Layout(8, 8, 4, rank=1, num_shares=2), None, torch.device("cpu"))
        for part in (slice(0, 3), slice(3, 7)):  # prefilled in two chunks
            cache.note(self.table, self.positions[part], self.tags[part])
        return cache

    def test_what_was_noted_is_held_for_whoever_has_the_blocks(self, cache):
        assert cache.holds(self.table, self.positions, self.tags)
        assert cache.holds(np.array([4, 1, 7]), self.positions[:5], self.tags[:5])
        assert cache.holds(self.table, self.positions[:0], self.tags[:0])
        assert cache.num_bytes == 0

    def test_a_foreign_item_is_noticed(self, cache):
        assert not cache.holds(self.table, self.positions, np.full(7, tag_of("a")))
        cache.note(np.array([6]), np.array([7]), np.array([tag_of("c")]))  # another request got the block
        assert not cache.holds(self.table, self.positions, self.tags)
        assert cache.holds(self.table, self.positions[:6], self.tags[:6])

    def test_a_token_whose_features_were_never_written_is_noticed(self, cache):
        assert not cache.holds(self.table, np.append(self.positions, 17)[[0, 1, 2, 3, 4, 5, 7]], self.tags)
        assert not cache.holds(np.array([4, 2, 6]), self.positions, self.tags)

    def test_a_block_table_that_is_too_short_holds_nothing_of_the_rest(self, cache):
        assert not cache.holds(self.table[:2], self.positions, self.tags)
        assert not cache.holds(self.table[:0], self.positions, self.tags)
        assert cache.holds(self.table[:2], self.positions[:5], self.tags[:5])


def test_tags_tell_items_apart_and_are_never_what_stands_for_nothing():
    tags = [tag_of(f"item{i}") for i in range(500)]
    assert len({*tags, 0}) == 501
    assert tags == [tag_of(f"item{i}") for i in range(500)]
    assert np.array(tags, dtype=np.int64).tolist() == tags


@pytest.mark.parametrize(
    ("policy", "relaxation", "most", "least"),
    [
        ("strict", 0.9, 10, 1),
        ("fly", 0.9, 10, 1),
        ("lvspec", 0.9, 10, 6),  # 5 of 6 are fillers, and 9 of 10
        ("lvspec", 0.9, 4, 4),
        ("lvspec", 0.5, 10, 2),
        ("lvspec", 1.0, 10, 1),
        ("lvspec", 0.0, 10, 1),
        ("random", 0.9, 20, 6),
    ],
)
def test_of_the_least_length_almost_as_many_are_fillers_as_of_the_longest(policy, relaxation, most, least):
    assert POLICIES[policy].least_length(relaxation, most) == least


@given(st.sampled_from(sorted(POLICIES)), st.floats(0, 1), st.integers(1, 64))
def test_every_policy_has_a_least_length(policy, relaxation, most):
    assert 1 <= POLICIES[policy].least_length(relaxation, most) <= most
