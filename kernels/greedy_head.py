"""The most likely next token by a head, without the logits of all others.

Behind a drafted token vLLM writes what each of a vocabulary's 150,000 tokens gets, cuts off what pads them, and looks
for the largest of these numbers. Here each program keeps the best of its tokens, and whoever comes last the best of
all. A head may be in e4m3 with a scale for each token (OCP 8-bit Floating Point Specification 1.0), which is half of
what there is to read; what was rounded away then decides between the few best. The model's last norm is done on the
way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _package  # noqa: F401
from .shared import Norm, Workspace

_LARGEST = 448.0  # that e4m3 has
_ROWS_AT_ONCE = 4096  # whose values are there in float32 while a head is rounded
_BLOCK_V = 32  # tokens of a program
_BLOCK_H = 256  # columns at once: with fewer, threads have too few of x to be loaded without waiting
_EXACT_H = 512  # of the candidates
_BLOCK_P = 1024  # programs whose best are looked at together
_NUM_STAGES = 4  # of loads on their way
_NUM_CANDIDATES = 4  # that compete once more
_LOWEST = tl.constexpr(-3.0e38)
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def _logits(
    rows_ptr,  # [BLOCK_V] pointers
    x_ptr,
    norm_ptr,
    eps,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Products of x, or of its norm, with as many rows as there are pointers."""
    sums = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    squares = tl.zeros((BLOCK_H,), tl.float32)
    # There is no product of matrices in it, for which alone the compiler would have loads on the way by itself.
    for first in tl.range(0, WIDTH, BLOCK_H, num_stages=NUM_STAGES):
        column = first + tl.arange(0, BLOCK_H)
        is_column = (column < WIDTH) | (WIDTH % BLOCK_H == 0)
        weight = tl.load(rows_ptr[:, None] + column[None, :], mask=is_column[None, :], other=0.0).to(tl.float32)
        x = tl.load(x_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x *= tl.load(norm_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        sums += weight * x[None, :]
    logits = tl.sum(sums, 1)
    if HAS_NORM:
        logits *= tl.rsqrt(tl.sum(squares) / WIDTH + eps)
    return logits


@triton.jit
def _bests(parts_ptr, num_programs, BLOCK_P: tl.constexpr):
    """The best logits of as many programs each, the sums of all theirs by these, and whose they are, `[BLOCK_P]`."""
    lane = tl.arange(0, BLOCK_P)
    bests = tl.full((BLOCK_P,), _LOWEST, tl.float32)
    totals = tl.zeros((BLOCK_P,), tl.float32)
    winners = tl.full((BLOCK_P,), _NO_TOKEN, tl.int32)
    for first in range(0, num_programs, BLOCK_P):
        is_part = first + lane < num_programs
        part = parts_ptr + first + lane
        # Not from a cache that may hold what was there before.
        best = tl.load(part, mask=is_part, other=_LOWEST, cache_modifier=".cg")
        total = tl.load(part + num_programs, mask=is_part, other=0.0, cache_modifier=".cg")
        winner = tl.load(part + 2 * num_programs, mask=is_part, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(bests, best)
        totals = totals * tl.exp(bests - higher) + total * tl.exp(best - higher)
        winners = tl.where(best > bests, winner.to(tl.int32, bitcast=True), winners)
        bests = higher
    return bests, totals, winners


@triton.jit
def _first_of(winners, bests, best):
    """Of those who have the best logit the first."""
    return tl.min(tl.where(bests == best, winners, _NO_TOKEN), 0)


@triton.jit(do_not_specialize=["num_tokens"])
def _greedy_head_kernel(
    x_ptr,  # [WIDTH]
    norm_ptr,  # [WIDTH]
    weight_ptr,  # [num_tokens, WIDTH]
    scales_ptr,  # [num_tokens]
    exact_ptr,  # [num_tokens, WIDTH]
    token_ptr,
    prob_ptr,
    parts_ptr,  # [3, num_programs] float32: the best logit, the sum of all by it, and whose it is
    arrived_ptr,  # 0, and 0 again in the end
    num_tokens,
    eps,
    WIDTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EXACT_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    NUM_CANDIDATES: tl.constexpr,
):
    """l[v] = sum over h of x[h] weight[v, h] scales[v];  token = argmax l, the first one;  prob = softmax l of it

    Where there are scales, the token is the best by `exact` of a few that are it by l.
    """
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    token = program * BLOCK_V + tl.arange(0, BLOCK_V)
    is_token = token < num_tokens
    # Behind the last token it is read again: loads need no masks then.
    row = weight_ptr + tl.minimum(token, num_tokens - 1).to(tl.int64) * WIDTH
    logits = _logits(row, x_ptr, norm_ptr, eps, WIDTH, HAS_NORM, BLOCK_V, BLOCK_H, NUM_STAGES)
    if HAS_SCALES:
        logits *= tl.load(scales_ptr + token, mask=is_token, other=0.0)
    logits = tl.where(is_token, logits, _LOWEST)
    highest = tl.max(logits, 0)
    part = parts_ptr + program
    tl.store(part, highest)
    tl.store(part + num_programs, tl.sum(tl.where(is_token, tl.exp(logits - highest), 0.0), 0))
    tl.store(part + 2 * num_programs, _first_of(token, logits, highest).to(tl.float32, bitcast=True))
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_programs - 1:
        bests, totals, winners = _bests(parts_ptr, num_programs, BLOCK_P)
        best = tl.max(bests, 0)
        total = tl.sum(totals * tl.exp(bests - best), 0)
        prob = 1.0 / total
        winner = _first_of(winners, bests, best)
        if HAS_SCALES:
            rank = tl.arange(0, NUM_CANDIDATES)
            candidates = tl.zeros((NUM_CANDIDATES,), tl.int32)
            rated = tl.full((NUM_CANDIDATES,), _LOWEST, tl.float32)
            for i in tl.static_range(NUM_CANDIDATES):
                highest = tl.max(bests, 0)
                candidate = _first_of(winners, bests, highest)
                bests = tl.where(winners == candidate, _LOWEST, bests)
                candidates = tl.where(rank == i, tl.minimum(candidate, num_tokens - 1), candidates)
                rated = tl.where(rank == i, highest, rated)
            exact_row = exact_ptr + candidates.to(tl.int64) * WIDTH
            exact = _logits(exact_row, x_ptr, norm_ptr, eps, WIDTH, HAS_NORM, NUM_CANDIDATES, EXACT_H, NUM_STAGES)
            highest = tl.max(exact, 0)
            winner = _first_of(candidates, exact, highest)
            # Where there are fewer programs than candidates, one of these is several.
            is_one = rated > _LOWEST
            # Where all others have next to nothing, rounding may leave them less than that.
            total -= tl.sum(tl.where(is_one, tl.exp(rated - best), 0.0), 0)
            others = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL) * tl.exp(best - highest)
            prob = 1.0 / (others + tl.sum(tl.where(is_one, tl.exp(exact - highest), 0.0), 0))
        # What is no number must not become a token that an embedding does not have.
        tl.store(token_ptr, tl.minimum(winner, num_tokens - 1).to(tl.int64))
        tl.store(prob_ptr, prob)
        tl.store(arrived_ptr, 0)


@dataclass(frozen=True)
class Head:
    """`weight [num_tokens, width]`, contiguous, in bfloat16; or in e4m3, with `scales [num_tokens]` float32, and
    `exact`, what it was made of."""

    weight: torch.Tensor
    scales: torch.Tensor | None = None
    exact: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.scales is None) != (self.exact is None):
            raise ValueError("a head has scales and what it was made of, or neither")

    @property
    def num_bytes(self) -> int:
        """Without what it was made of."""
        return self.weight.nbytes + (0 if self.scales is None else self.scales.nbytes)


def reads_e4m3(device: torch.device) -> bool:
    """Whether kernels there can read numbers in e4m3: NVIDIA's from sm_89 on, and in the interpreter."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def in_eight_bits(head: Head) -> Head:
    """A head in e4m3 of one that is not, rounded to nearest, each token's largest weight being the largest that there
    is."""
    weight = torch.empty_like(head.weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(weight), device=weight.device)
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        values = head.weight[rows].float()
        scales[rows] = values.abs().amax(dim=1).clamp(min=1e-30) / _LARGEST
        weight[rows] = (values / scales[rows, None]).clamp(-_LARGEST, _LARGEST).to(weight.dtype)
    return Head(weight, scales, head.weight)


def greedy_head_reference(
    x: torch.Tensor, head: Head, num_tokens: int, norm: Norm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in PyTorch."""
    values = x.float()
    if norm is not None:
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()
    logits = values @ head.weight[:num_tokens].float().T
    if head.scales is None or head.exact is None:
        token_ids = (logits == logits.max()).int().argmax(dim=-1)  # the first of equal ones
        return token_ids, logits.softmax(-1)[:, token_ids[0]]
    logits = logits * head.scales[:num_tokens]
    candidates: dict[int, int] = {}
    for token in logits[0].argsort(descending=True, stable=True).tolist():
        candidates.setdefault(token // _BLOCK_V % _BLOCK_P, token)
        if len(candidates) == _NUM_CANDIDATES:
            break
    token_ids = torch.tensor(sorted(candidates.values()), device=x.device)
    exact = (values @ head.exact[token_ids].float().T)[0]
    logits[0, token_ids] = exact
    winner = token_ids[exact == exact.max()][:1]
    return winner, logits.softmax(-1)[0, winner]


def launch_greedy_head(
    x: torch.Tensor, head: Head, num_tokens: int, workspace: Workspace, norm: Norm | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `x [1, width]` the most likely of the first `num_tokens` tokens and its probability, by the Triton kernel:
    `[1]` int64 and `[1]` float32. `norm`: of `x` before it is multiplied. By a head in e4m3 four of the most likely
    compete once more, by what it was made of: of 32 tokens that follow one another, and of as many as are 32,768 apart
    from these, at most one. Raises ValueError for another `x`, and for more tokens than there are."""
    width = head.weight.shape[1]
    if x.shape != (1, width) or not 0 < num_tokens <= len(head.weight):
        raise ValueError(
            f"x {tuple(x.shape)}, {num_tokens} tokens: must be a row of {width}, and 1 to {len(head.weight)} tokens"
        )
    num_programs = triton.cdiv(num_tokens, _BLOCK_V)
    workspace.reserve(3 * num_programs, 1)
    token_ids = torch.empty(1, dtype=torch.int64, device=x.device)
    probs = torch.empty(1, device=x.device)
    x = x.contiguous()
    _greedy_head_kernel[(num_programs,)](
        x,
        x if norm is None else norm.weight,
        head.weight,
        probs if head.scales is None else head.scales,
        x if head.exact is None else head.exact,
        token_ids,
        probs,
        workspace.parts,
        workspace.arrived,
        num_tokens,
        0.0 if norm is None else norm.eps,
        WIDTH=width,
        HAS_NORM=norm is not None,
        HAS_SCALES=head.scales is not None,
        BLOCK_V=_BLOCK_V,
        BLOCK_H=_BLOCK_H,
        EXACT_H=_EXACT_H,
        BLOCK_P=_BLOCK_P,
        NUM_STAGES=_NUM_STAGES,
        NUM_CANDIDATES=_NUM_CANDIDATES,
        num_warps=4,
    )
    return token_ids, probs
