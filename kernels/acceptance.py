"""Which drafted tokens of a step are emitted: exact, loose on fillers, or shifted, for all requests in one launch.

After LVSpec (arXiv 2604.05650): anchors, the drafted tokens most relevant to what is seen, need the target's token at
their place or, within a window, at a neighbouring one; fillers are taken as drafted. Drafted tokens of a request are
`d[0..num_drafted)`, the target's choices at their places `t`. In order:

1. The chain `d[0..k)` stops before the first padding (an id below 0) and after the first end token.
2. Anchors are the `k - num_fillers[k]` tokens of highest relevance, ties included, all of at least `threshold`, and
   all whose relevance is not a number.
3. `free`: neither `d[i]` nor `t[i]` is an end token or of a guarded kind, and `d[i]` has at least the share
   `probability_floor` of the probability of the target's best token, and more than none.
4. Loose: not exact, not an anchor, but free.
5. Shift: not exact, an anchor, but free. For `i` rising, it takes the nearest choice `t[j] == d[i]` that is no exact
   token's and no earlier one's, `0 < |j - i| <= window`, the smaller `j` first, over no order word where those are
   guarded.
6. `n` is the first place that is none of these, else `k`. Shifts that rest on `t[j]`, `j >= n`, are void; `n` is found
   again until none is.
7. Emitted are `d[0..n)` and `t[n]`, the bonus token where all that was drafted passed; nothing after an end token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import _package  # noqa: F401

EXACT, LOOSE, SHIFT, TARGET = 1, 2, 3, 4  # reasons; 0 where nothing is emitted
END, SPECIAL, NEGATION, NUMBER, ORDER = 1, 2, 4, 8, 16  # kinds of tokens, bits
_ORDER = tl.constexpr(ORDER)
_END = tl.constexpr(END)


@dataclass(frozen=True)
class Chains:
    """What was drafted in a step and what the target says of it; flat over requests as in vLLM.

    `draft_ids`, `target_ids [num_drafted]` int32, `bonus_ids [num_requests]` int32, `starts [num_requests + 1]` int32
    (cumulated), `exact [num_drafted]` bool, `relevance`, `relative_probs [num_drafted]` float32 (probability of the
    drafted token over that of the target's best).
    """

    draft_ids: torch.Tensor
    target_ids: torch.Tensor
    bonus_ids: torch.Tensor
    starts: torch.Tensor
    exact: torch.Tensor
    relevance: torch.Tensor
    relative_probs: torch.Tensor


@dataclass(frozen=True)
class Rules:
    """What each request allows.

    `num_fillers [num_requests, max_drafted + 1]` int32 (by length of the chain), `thresholds`, `probability_floors
    [num_requests]` float32, `windows [num_requests]` int32 (0: no shift), `guards [num_requests]` int32 (kinds that are
    never loose), `stop_ids [num_requests, num_stops]` int32 (the request's own end tokens; -1: none), `kinds
    [vocab_size]` uint8 (bits of every token), `ends [num_requests]` bool (whether tokens of kind END end the request),
    `back_only`: a shift takes earlier choices only.
    """

    num_fillers: torch.Tensor
    thresholds: torch.Tensor
    probability_floors: torch.Tensor
    windows: torch.Tensor
    guards: torch.Tensor
    stop_ids: torch.Tensor
    kinds: torch.Tensor
    ends: torch.Tensor
    back_only: bool = False


@dataclass(frozen=True)
class Accepted:
    """`token_ids [num_requests, max_drafted + 1]` int32 (-1 behind the last), `reasons` int8 and `sources` int16 of the
    same shape: why each was emitted, and for a shift the place of the target's choice that it rests on (else -1)."""

    token_ids: torch.Tensor
    reasons: torch.Tensor
    sources: torch.Tensor


@triton.jit(do_not_specialize=["num_stops", "max_drafted"])
def _accept_kernel(
    token_ids_ptr,
    reasons_ptr,
    sources_ptr,
    draft_ids_ptr,
    target_ids_ptr,
    bonus_ids_ptr,
    starts_ptr,
    exact_ptr,
    relevance_ptr,
    relative_probs_ptr,
    num_fillers_ptr,
    thresholds_ptr,
    probability_floors_ptr,
    windows_ptr,
    guards_ptr,
    stop_ids_ptr,
    num_stops,
    kinds_ptr,
    ends_ptr,
    max_drafted,
    BACK_ONLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rules of this file for one request."""
    request = tl.program_id(0)
    start = tl.load(starts_ptr + request)
    num_drafted = tl.load(starts_ptr + request + 1) - start
    place = tl.arange(0, BLOCK)
    is_drafted = place < num_drafted
    draft = tl.load(draft_ids_ptr + start + place, mask=is_drafted, other=-1)
    target = tl.load(target_ids_ptr + start + place, mask=is_drafted, other=-1)
    draft_kind = tl.load(kinds_ptr + draft, mask=is_drafted & (draft >= 0), other=0).to(tl.int32)
    target_kind = tl.load(kinds_ptr + target, mask=is_drafted & (target >= 0), other=0).to(tl.int32)

    ends = tl.load(ends_ptr + request).to(tl.int32)
    is_end = ((draft_kind & _END) * ends) != 0
    stops = is_end | ((draft_kind & _END) != 0) | ((target_kind & _END) != 0)
    for s in range(num_stops):
        stop = tl.load(stop_ids_ptr + request * num_stops + s)
        is_end |= (draft == stop) & (stop >= 0)
        stops |= ((draft == stop) | (target == stop)) & (stop >= 0)
    first_end = tl.min(tl.where(is_end, place, BLOCK), axis=0)
    length = tl.minimum(tl.min(tl.where(draft < 0, place, num_drafted), axis=0), first_end + 1)
    in_chain = place < length

    exact = (tl.load(exact_ptr + start + place, mask=in_chain, other=0) != 0) & in_chain
    relevance = tl.load(relevance_ptr + start + place, mask=in_chain, other=float("-inf"))
    relevance = tl.where(relevance != relevance, float("inf"), relevance)
    num_anchors = length - tl.load(num_fillers_ptr + request * (max_drafted + 1) + length)
    higher = (relevance[None, :] > relevance[:, None]) & in_chain[None, :]
    rank = tl.sum(higher.to(tl.int32), axis=1)
    threshold = tl.load(thresholds_ptr + request)
    anchor = (rank < num_anchors) | (relevance >= threshold) | (relevance == float("inf"))

    guards = tl.load(guards_ptr + request)
    share = tl.load(relative_probs_ptr + start + place, mask=in_chain, other=0.0)
    free = in_chain & ~stops & (((draft_kind | target_kind) & guards) == 0)
    free &= (share > 0) & (share >= tl.load(probability_floors_ptr + request))
    loose = free & ~exact & ~anchor

    window = tl.load(windows_ptr + request)
    source = tl.full([BLOCK], -1, tl.int32)
    if window > 0:
        is_order = (((draft_kind | target_kind) & guards & _ORDER) != 0) & in_chain
        order = is_order.to(tl.int32)
        num_order = tl.cumsum(order, axis=0)
        wants = (free & ~exact & anchor).to(tl.int32)
        used = exact
        for i in range(length):
            here = place == i
            if tl.sum(tl.where(here, wants, 0)) > 0:
                token = tl.sum(tl.where(here, draft, 0))
                order_here = tl.sum(tl.where(here, order, 0))
                num_here = tl.sum(tl.where(here, num_order, 0))
                distance = tl.abs(place - i)
                crossed = tl.where(place < i, num_here - num_order + order, num_order - num_here + order_here)
                fits = in_chain & ~used & (target == token) & (distance > 0) & (distance <= window) & (crossed == 0)
                if BACK_ONLY:
                    fits &= place < i
                # The nearest, and of two as near the earlier one.
                best = tl.min(tl.where(fits, distance * BLOCK + place, BLOCK * BLOCK), axis=0)
                found = best < BLOCK * BLOCK
                used |= (place == best % BLOCK) & found
                source = tl.where(here & found, best % BLOCK, source)

    num_accepted = length
    before = length + 1
    while num_accepted < before:
        before = num_accepted
        source = tl.where(source >= num_accepted, -1, source)
        passes = exact | loose | (source >= 0)
        num_accepted = tl.min(tl.where(in_chain & ~passes, place, length), axis=0)
    ended = (num_accepted > 0) & (num_accepted == first_end + 1)
    last = tl.sum(tl.where(place == num_accepted, target, 0))
    last = tl.where(num_accepted < num_drafted, last, tl.load(bonus_ids_ptr + request))

    accepted = place < num_accepted
    row = request * (max_drafted + 1) + place
    reason = tl.where(exact, 1, tl.where(loose, 2, 3))
    is_target = (place == num_accepted) & ~ended
    is_row = place <= max_drafted
    tl.store(token_ids_ptr + row, tl.where(accepted, draft, tl.where(is_target, last, -1)), mask=is_row)
    tl.store(reasons_ptr + row, tl.where(accepted, reason, tl.where(is_target, 4, 0)).to(tl.int8), mask=is_row)
    tl.store(sources_ptr + row, tl.where(accepted & (reason == 3), source, -1).to(tl.int16), mask=is_row)


def accept_reference(chains: Chains, rules: Rules) -> Accepted:
    """The same in PyTorch, all requests at once."""
    starts = chains.starts.long()
    counts = starts.diff()
    device = starts.device
    num_requests, width = len(counts), rules.num_fillers.shape[1]
    place = torch.arange(width, device=device)
    rows = torch.arange(num_requests, device=device)
    # One row a request, filled up with what stands behind the last drafted token.
    index = torch.where(place < counts[:, None], starts[:-1, None] + place, len(chains.draft_ids))
    ids = torch.stack([chains.draft_ids.long(), chains.target_ids.long()])
    ids = F.pad(ids, (0, 1), value=-1)[:, index]
    draft, target = ids.unbind()
    relevance, share = F.pad(torch.stack([chains.relevance, chains.relative_probs]), (0, 1))[:, index].unbind()
    draft_kind, target_kind = (rules.kinds[ids.clamp(min=0)].int() * (ids >= 0)).unbind()
    kind = draft_kind | target_kind
    is_end = ((draft_kind & END) != 0) & rules.ends[:, None]
    stops = (kind & END) != 0
    if rules.stop_ids.shape[1]:
        own = torch.where(rules.stop_ids >= 0, rules.stop_ids, -2).long()[:, None, :]
        is_own = (ids[..., None] == own).any(-1)
        is_end |= is_own[0]
        stops |= is_own.any(0)
    first_end = torch.where(is_end, place, width).amin(1)
    length = torch.where(draft < 0, torch.minimum(place, counts[:, None]), counts[:, None]).amin(1)
    length = torch.minimum(length, first_end + 1)
    in_chain = place < length[:, None]

    exact = F.pad(chains.exact, (0, 1))[index] & in_chain
    relevance = relevance.nan_to_num(float("inf"), float("inf"), float("-inf"))
    num_anchors = length - rules.num_fillers[rows, length]
    rank = ((relevance[:, None, :] > relevance[:, :, None]) & in_chain[:, None, :]).sum(-1)
    anchor = (rank < num_anchors[:, None]) | (relevance >= rules.thresholds[:, None]) | (relevance == float("inf"))

    free = in_chain & ~stops & ((kind & rules.guards[:, None]) == 0)
    free &= (share > 0) & (share >= rules.probability_floors[:, None])
    loose = free & ~exact & ~anchor

    source = torch.full_like(draft, -1)
    wants = free & ~exact & anchor & (rules.windows > 0)[:, None]
    wanting = wants.any(0).nonzero()[:, 0].tolist()  # places where any request could use a shift
    if wanting:
        order = ((kind & rules.guards[:, None] & ORDER) != 0) & in_chain
        num_order = order.int().cumsum(1)
        used = exact.clone()
    for i in wanting:
        distance = (place - i).abs()
        crossed = torch.where(
            place < i,
            num_order[:, i : i + 1] - num_order + order.int(),
            num_order - num_order[:, i : i + 1] + order[:, i : i + 1].int(),
        )
        fits = wants[:, i : i + 1] & in_chain & ~used & (target == draft[:, i : i + 1]) & (crossed == 0)
        fits &= (distance > 0) & (distance <= rules.windows[:, None])
        if rules.back_only:
            fits &= place < i
        nearest = torch.where(fits, distance * width + place, width * width).amin(1)
        found = nearest < width * width
        used |= (place == (nearest % width)[:, None]) & found[:, None]
        source[:, i] = torch.where(found, nearest % width, -1)

    num_accepted = length
    while True:
        source = torch.where(source >= num_accepted[:, None], -1, source)
        passes = exact | loose | (source >= 0)
        shorter = torch.where(in_chain & ~passes, place, length[:, None]).amin(1)
        if torch.equal(shorter, num_accepted):
            break
        num_accepted = shorter
    ended = num_accepted == first_end + 1
    chosen = torch.cat([target, target.new_full((num_requests, 1), -1)], 1)[rows, num_accepted]
    last = torch.where(num_accepted < counts, chosen, chains.bonus_ids)

    accepted = place < num_accepted[:, None]
    is_target = (place == num_accepted[:, None]) & ~ended[:, None]
    reason = torch.where(exact, EXACT, torch.where(loose, LOOSE, SHIFT))
    return Accepted(
        torch.where(accepted, draft, torch.where(is_target, last[:, None], -1)).int(),
        torch.where(accepted, reason, torch.where(is_target, TARGET, 0)).to(torch.int8),
        torch.where(accepted & (reason == SHIFT), source, -1).to(torch.int16),
    )


def accept(chains: Chains, rules: Rules) -> Accepted:
    """Apply the rules of this file. Raises ValueError where shapes don't fit."""
    num_requests, num_drafted = len(chains.bonus_ids), len(chains.draft_ids)
    flat = chains.target_ids, chains.exact, chains.relevance, chains.relative_probs
    each = rules.thresholds, rules.probability_floors, rules.windows, rules.guards, rules.stop_ids, rules.ends
    if (
        len(chains.starts) != num_requests + 1
        or any(len(x) != num_drafted for x in flat)
        or any(len(x) != num_requests for x in (*each, rules.num_fillers))
    ):
        raise ValueError(
            f"shapes differ: {num_requests} bonus_ids, {len(chains.starts)} starts, {num_drafted} draft_ids, "
            f"{[len(x) for x in flat]} of the target's, {[len(x) for x in (*each, rules.num_fillers)]} rules"
        )
    return launch_accept(chains, rules) if chains.draft_ids.is_cuda else accept_reference(chains, rules)


def launch_accept(chains: Chains, rules: Rules) -> Accepted:
    """Launch the Triton kernel; every tensor must be contiguous."""
    num_requests, width = rules.num_fillers.shape
    device = chains.draft_ids.device
    result = Accepted(
        torch.empty((num_requests, width), dtype=torch.int32, device=device),
        torch.empty((num_requests, width), dtype=torch.int8, device=device),
        torch.empty((num_requests, width), dtype=torch.int16, device=device),
    )
    if not num_requests:
        return result
    _accept_kernel[(num_requests,)](
        result.token_ids,
        result.reasons,
        result.sources,
        chains.draft_ids,
        chains.target_ids,
        chains.bonus_ids,
        chains.starts,
        chains.exact,
        chains.relevance,
        chains.relative_probs,
        rules.num_fillers,
        rules.thresholds,
        rules.probability_floors,
        rules.windows,
        rules.guards,
        rules.stop_ids,
        rules.stop_ids.shape[1],
        rules.kinds,
        rules.ends,
        width - 1,
        BACK_ONLY=rules.back_only,
        BLOCK=max(2, triton.next_power_of_2(width)),
    )
    return result
