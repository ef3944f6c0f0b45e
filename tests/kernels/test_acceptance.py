"""Acceptance in Triton and in PyTorch against the rules written out token by token."""

import math
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from vllm_lvspec.kernels import acceptance
from vllm_lvspec.kernels.acceptance import (
    END,
    EXACT,
    LOOSE,
    NEGATION,
    NUMBER,
    ORDER,
    SHIFT,
    SPECIAL,
    TARGET,
    Accepted,
    Chains,
    Rules,
    accept,
    accept_reference,
    launch_accept,
)  # fmt: skip

VOCABULARY = 12
KINDS = [END, SPECIAL, NEGATION, NUMBER, ORDER, ORDER | NUMBER] + [0] * (VOCABULARY - 6)


@dataclass
class Request:
    """One request's chain, what the target says of it, and what it allows."""

    draft: list[int]
    target: list[int]  # one more: the bonus token
    exact: list[bool]
    relevance: list[float]
    share: list[float]
    relaxation: float = 0.7
    threshold: float = math.inf
    floor: float = 0.0
    window: int = 0
    guards: int = SPECIAL
    stop_ids: tuple[int, ...] = ()
    ends: bool = True


def literally(request: Request, back_only: bool) -> tuple[list[int], list[int], list[int]]:
    """Emitted tokens, reasons and sources, by the rules and nothing else."""
    d, t = request.draft, request.target
    ends = set(request.stop_ids) | ({0} if request.ends else set())
    k = 0
    while k < len(d) and d[k] >= 0:
        k += 1
        if d[k - 1] in ends:
            break
    exact = request.exact[:k]
    score = [math.inf if math.isnan(a) else a for a in request.relevance[:k]]
    num_anchors = k - math.floor(request.relaxation * k + 1e-9)
    boundary = sorted(score, reverse=True)[num_anchors - 1] if num_anchors else math.inf
    anchor = [a >= boundary or a >= request.threshold for a in score]

    def kind(token: int) -> int:
        return KINDS[token] if token >= 0 else 0

    def is_free(i: int) -> bool:
        for token in (d[i], t[i]):
            if kind(token) & (END | request.guards) or token in request.stop_ids:
                return False
        return request.share[i] > 0 and request.share[i] >= request.floor

    free = [is_free(i) for i in range(k)]
    loose = [not exact[i] and not anchor[i] and free[i] for i in range(k)]
    taken, shift = {j for j in range(k) if exact[j]}, {}

    def crosses(i: int, j: int) -> bool:
        between = range(min(i, j), max(i, j) + 1)
        return bool(request.guards & ORDER) and any((kind(d[m]) | kind(t[m])) & ORDER for m in between)

    for i in range(k):
        if exact[i] or not anchor[i] or not free[i]:
            continue
        near = [j for j in range(k) if 0 < abs(j - i) <= request.window and t[j] == d[i] and j not in taken]
        near = [j for j in near if not crosses(i, j) and (j < i or not back_only)]
        if near:
            shift[i] = min(near, key=lambda j: (abs(j - i), j))
            taken.add(shift[i])
    while True:
        n = next((i for i in range(k) if not (exact[i] or loose[i] or i in shift)), k)
        void = [i for i, j in shift.items() if j >= n]
        if not any(i < n for i in void):
            break
        for i in void:
            del shift[i]
    tokens = d[:n]
    reasons = [EXACT if exact[i] else LOOSE if loose[i] else SHIFT for i in range(n)]
    sources = [shift[i] if reasons[i] == SHIFT else -1 for i in range(n)]
    if not (n and d[n - 1] in ends):
        tokens, reasons, sources = [*tokens, t[n]], [*reasons, TARGET], [*sources, -1]
    return tokens, reasons, sources


def batch(requests: list[Request], device: str | torch.device = "cpu", back_only: bool = False) -> tuple[Chains, Rules]:
    def flat(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    counts = [len(r.draft) for r in requests]
    width = max([*counts, 1]) + 1
    num_stops = max(len(r.stop_ids) for r in requests)
    stops = [[*r.stop_ids, *[-1] * (num_stops - len(r.stop_ids))] for r in requests]
    chains = Chains(
        draft_ids=flat([x for r in requests for x in r.draft], torch.int32),
        target_ids=flat([x for r in requests for x in r.target[:-1]], torch.int32),
        bonus_ids=flat([r.target[-1] for r in requests], torch.int32),
        starts=flat([sum(counts[:i]) for i in range(len(counts) + 1)], torch.int32),
        exact=flat([x for r in requests for x in r.exact], torch.bool),
        relevance=flat([x for r in requests for x in r.relevance], torch.float32),
        relative_probs=flat([x for r in requests for x in r.share], torch.float32),
    )
    rules = Rules(
        num_fillers=flat([[math.floor(r.relaxation * k + 1e-9) for k in range(width)] for r in requests], torch.int32),
        thresholds=flat([r.threshold for r in requests], torch.float32),
        probability_floors=flat([r.floor for r in requests], torch.float32),
        windows=flat([r.window for r in requests], torch.int32),
        guards=flat([r.guards for r in requests], torch.int32),
        stop_ids=flat(stops, torch.int32).view(len(requests), num_stops),
        kinds=flat(KINDS, torch.uint8),
        ends=flat([r.ends for r in requests], torch.bool),
        back_only=back_only,
    )
    return chains, rules


def read(accepted: Accepted) -> list[tuple[list[int], list[int], list[int]]]:
    rows = []
    for tokens, reasons, sources in zip(*(x.tolist() for x in vars(accepted).values()), strict=True):
        n = sum(r > 0 for r in reasons)
        assert tokens[n:] == sources[n:] == [-1] * (len(tokens) - n)
        assert not any(reasons[n:])
        rows.append((tokens[:n], reasons[:n], sources[:n]))
    return rows


tokens = st.integers(0, VOCABULARY - 1)
# Few values, so that there are ties, and floats that float32 holds.
values = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.5, 0.75, 1.0])


@st.composite
def request(draw: st.DrawFn, max_drafted: int = 12) -> Request:
    k = draw(st.integers(0, max_drafted))
    target = draw(st.lists(tokens, min_size=k + 1, max_size=k + 1))
    # Drafts that often hit, at their own place or a neighbour's.
    draft = [
        draw(st.one_of(st.just(target[i]), st.just(target[max(i - 1, 0)]), st.just(target[i + 1]), tokens))
        for i in range(k)
    ]
    if draw(st.booleans()) and draw(st.booleans()):
        cut = draw(st.integers(0, k))
        draft[cut:] = [-1] * (k - cut)
    return Request(
        draft=draft,
        target=target,
        exact=[d == t for d, t in zip(draft, target, strict=False)],
        relevance=draw(st.lists(st.one_of(values, values, st.just(math.nan)), min_size=k, max_size=k)),
        share=draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=k, max_size=k)),
        relaxation=draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0])),
        threshold=draw(st.sampled_from([math.inf, math.inf, 0.5])),
        floor=draw(st.sampled_from([0.0, 0.25])),
        window=draw(st.sampled_from([0, 1, 3, 20])),
        guards=SPECIAL | draw(st.sampled_from([0, NEGATION, NUMBER | ORDER])),
        stop_ids=draw(st.sampled_from([(), (7,), (7, 11)])),
        ends=draw(st.booleans()),
    )


slow = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.lists(request(), min_size=1, max_size=5), st.booleans())
@settings(max_examples=600, deadline=None)
def test_the_reference_follows_the_rules(requests, back_only):
    assert read(accept(*batch(requests, back_only=back_only))) == [literally(r, back_only) for r in requests]


@given(st.lists(request(), min_size=1, max_size=4), st.booleans())
@slow
def test_the_kernel_follows_the_rules(device, requests, back_only):
    chains, rules = batch(requests, device, back_only)
    assert read(launch_accept(chains, rules)) == [literally(r, back_only) for r in requests]


@pytest.mark.parametrize("num_drafted", [1, 2, 5, 16, 31, 32, 128])
def test_the_kernel_does_what_its_reference_does_at_every_length(num_drafted, device):
    generator = torch.Generator().manual_seed(num_drafted)

    def some(n: int) -> list[int]:
        return torch.randint(6, VOCABULARY, (n,), generator=generator).tolist()

    requests = []
    for k in (num_drafted, 0, max(num_drafted // 2, 1)):
        target = some(k + 1)
        draft = [t if i % 3 else d for i, (t, d) in enumerate(zip(target, some(k), strict=False))]
        exact = [d == t for d, t in zip(draft, target, strict=False)]
        relevance = torch.rand(k, generator=generator).tolist()
        requests.append(Request(draft, target, exact, relevance, [0.5] * k, relaxation=0.8, window=6))
    chains, rules = batch(requests, device)
    assert read(launch_accept(chains, rules)) == read(accept_reference(chains, rules))


@given(request(), st.booleans())
def test_without_relaxation_and_shifts_the_exact_prefix_and_the_targets_token_are_emitted(one, back_only):
    strict = replace(one, relaxation=0.0, window=0)
    ((emitted, reasons, _),) = read(accept(*batch([strict], back_only=back_only)))
    assert emitted == one.target[: len(emitted)]
    assert set(reasons) <= {EXACT, TARGET}


@given(request(), st.booleans())
@settings(max_examples=300)
def test_what_is_emitted_is_possible_ends_where_it_ends_and_uses_each_choice_once(one, back_only):
    ((emitted, reasons, sources),) = read(accept(*batch([one], back_only=back_only)))
    ends = set(one.stop_ids) | ({0} if one.ends else set())
    assert emitted
    assert not set(emitted[:-1]) & ends
    for i, (token, reason) in enumerate(zip(emitted, reasons, strict=True)):
        if reason in (LOOSE, SHIFT):
            assert one.share[i] > 0
            assert not KINDS[token] & END
            assert not KINDS[one.target[i]] & END  # an answer never runs past the target's own end
    used = [j for j in sources if j >= 0] + [i for i, r in enumerate(reasons) if r == EXACT]
    assert len(used) == len(set(used))
    assert all(one.target[j] == emitted[i] for i, j in enumerate(sources) if j >= 0)
    accepted = sum(r != TARGET for r in reasons)
    assert all(j < accepted for j in sources)


@given(st.lists(request(), min_size=2, max_size=4))
def test_the_order_of_requests_does_not_matter(requests):
    there = read(accept(*batch(requests)))
    back = read(accept(*batch(requests[::-1])))
    assert there == back[::-1]


def test_end_of_sequence_is_never_accepted_loosely():
    for draft, target in (([0, 8], [9, 8, 8]), ([9, 8], [0, 8, 8])):
        one = Request(draft, target, [False, True], [0.1, 0.9], [1.0, 1.0], relaxation=1.0, window=2, ends=False)
        assert read(accept(*batch([one]))) == [([target[0]], [TARGET], [-1])]


def test_two_swapped_anchors_are_two_shifts():
    one = Request([8, 9, 7], [9, 8, 7, 6], [False, False, True], [0.9] * 3, [1.0] * 3, relaxation=0.0, window=1)
    assert read(accept(*batch([one]))) == [([8, 9, 7, 6], [SHIFT, SHIFT, EXACT, TARGET], [1, 0, -1, -1])]


def test_a_shift_that_rests_on_a_choice_behind_the_end_is_void():
    one = Request([8, 9, 7], [9, 10, 8, 6], [False] * 3, [0.9] * 3, [1.0] * 3, relaxation=0.0, window=2)
    assert read(accept(*batch([one]))) == [([9], [TARGET], [-1])]


def test_shapes_that_differ_are_refused():
    chains, rules = batch([Request([8], [8, 9], [True], [0.1], [1.0])])
    with pytest.raises(ValueError, match="shapes differ"):
        accept(replace(chains, exact=chains.exact[:0]), rules)
    with pytest.raises(ValueError, match="shapes differ"):
        accept(chains, replace(rules, windows=rules.windows[:0]))


def test_reasons_are_told_apart():
    assert len({acceptance.EXACT, acceptance.LOOSE, acceptance.SHIFT, acceptance.TARGET, 0}) == 5
