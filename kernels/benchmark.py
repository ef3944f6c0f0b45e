"""Time every kernel beside its PyTorch reference: `python -m vllm_lvspec.kernels.benchmark`.

Prints the bytes a kernel must move over the time it takes, as a share of what a plain copy reaches on the same device;
in the end of a token through all layers of decoders in four bits, in a CUDA graph, as a drafter's tokens go. Where no
GPU is, the references alone are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table

from vllm_lvspec.kernels.acceptance import Chains, Rules, accept_reference, launch_accept
from vllm_lvspec.kernels.advance_decode import advance_decode_reference, launch_advance_decode
from vllm_lvspec.kernels.attention_mass import attention_mass_reference, gather_keys, launch_attention_mass
from vllm_lvspec.kernels.copy_slots import PagedCaches, copy_slots_reference, launch_copy_slots
from vllm_lvspec.kernels.decode_attention import Heads, Rows, decode_attention_reference, launch_decode_attention
from vllm_lvspec.kernels.greedy_head import Head, greedy_head_reference, in_eight_bits, launch_greedy_head, reads_e4m3
from vllm_lvspec.kernels.mxfp4_matvec import Matrix, launch_mxfp4_matvec, launch_shrink, mxfp4_matvec_reference
from vllm_lvspec.kernels.relevance import (
    VisualPages,
    launch_mean_of_top,
    launch_top_cosines,
    mean_of_top_reference,
    top_cosines_reference,
)
from vllm_lvspec.kernels.shared import Norm, Workspace
from vllm_lvspec.kernels.silu_and_mul import launch_silu_and_mul, silu_and_mul_reference
from vllm_lvspec.kernels.token_layers import Layer, TokenLayers, token_layers_reference

COPY_BYTES = 2**28
VOCABULARY = 152064


@dataclass(frozen=True)
class Case:
    """One kernel on inputs of one size; `num_bytes` are read and written at the least."""

    name: str
    launch: Callable[[], object]
    reference: Callable[[], object]
    num_bytes: int
    in_graph: bool = False  # whether the launches are timed as a CUDA graph, which knows no host


def relevance_case(num_requests: int, num_drafted: int, num_visual: int, width: int, device: torch.device) -> Case:
    block_size = 16
    blocks = -(-num_visual // block_size)
    features = torch.randn(num_requests * blocks, block_size, 1, width, device=device, dtype=torch.bfloat16)
    queries = torch.randn(num_requests * num_drafted, width, device=device, dtype=torch.bfloat16)
    table = torch.randperm(num_requests * blocks, device=device).int().view(num_requests, blocks)
    positions = torch.arange(num_visual, device=device, dtype=torch.int32).repeat(num_requests)
    each = torch.arange(num_requests + 1, device=device, dtype=torch.int32)
    batch = queries, each * num_drafted, VisualPages(features, table, positions, each * num_visual), 10
    return Case(
        f"relevance, {num_requests} x {num_drafted} tokens, {num_visual} visual, {width} wide",
        lambda: launch_mean_of_top(launch_top_cosines(*batch, num_drafted), 10),
        lambda: mean_of_top_reference(top_cosines_reference(*batch), 10),
        num_requests * (num_visual + num_drafted) * width * 2,
    )


def acceptance_case(num_requests: int, num_drafted: int, device: torch.device) -> Case:
    count = num_requests * num_drafted
    each = torch.arange(num_requests + 1, device=device, dtype=torch.int32)
    draft, target = (torch.randint(100, 120, (count,), device=device, dtype=torch.int32) for _ in range(2))
    chains = Chains(
        draft, target, target[:num_requests], each * num_drafted, draft == target, torch.rand(count, device=device),
        torch.rand(count, device=device),
    )  # fmt: skip
    fillers = (torch.arange(num_drafted + 1, device=device) * 7 // 10).int().repeat(num_requests, 1)
    ones = torch.ones(num_requests, device=device)
    rules = Rules(
        fillers, ones * float("inf"), ones * 0, (ones * 3).int(), (ones * 2).int(),
        torch.full((num_requests, 1), -1, device=device, dtype=torch.int32),
        torch.zeros(VOCABULARY, device=device, dtype=torch.uint8), ones.bool(),
    )  # fmt: skip
    return Case(
        f"acceptance, {num_requests} x {num_drafted} tokens",
        lambda: launch_accept(chains, rules),
        lambda: accept_reference(chains, rules),
        count * (4 + 4 + 1 + 4 + 4 + 2) + num_requests * (num_drafted + 1) * (4 + 4 + 1 + 2),
    )


def advance_decode_case(num_rows: int, device: torch.device) -> Case:
    batch = (
        torch.zeros(3, num_rows, device=device, dtype=torch.int64),
        torch.zeros(num_rows, device=device, dtype=torch.int32),
        torch.zeros(num_rows, device=device, dtype=torch.int64),
        # Every timed call moves on by one token.
        torch.zeros(num_rows, 2**16, device=device, dtype=torch.int32),
        16,
    )
    return Case(
        f"advance_decode, {num_rows} rows",
        lambda: launch_advance_decode(*batch),
        lambda: advance_decode_reference(*batch),
        num_rows * (3 * 16 + 8 + 8 + 4),
    )


def attention_mass_case(
    num_queries: int, num_keys: int, num_visual: int, num_heads: int, num_kv_heads: int, device: torch.device
) -> Case:
    block_size, head_size = 16, 128
    blocks = -(-num_keys // block_size)
    # Keys with values beside them, as in vLLM's caches; the queries are those behind all else.
    shape = blocks, num_kv_heads, block_size, 2 * head_size
    keys = torch.randn(shape, device=device, dtype=torch.bfloat16)[..., :head_size]
    queries = torch.randn(num_queries, num_heads, head_size, device=device, dtype=torch.bfloat16)
    places = torch.arange(num_keys - num_queries, num_keys, device=device, dtype=torch.int32)
    table = torch.randperm(blocks, device=device).int()
    visual = torch.arange(16, 16 + num_visual, device=device, dtype=torch.int32)
    scale = head_size**-0.5
    return Case(
        f"attention_mass, {num_queries} x {num_heads} queries, {num_keys} x {num_kv_heads} keys, {num_visual} visual",
        lambda: launch_attention_mass(queries, places, keys, table, visual, scale),
        lambda: attention_mass_reference(queries, places, gather_keys(keys, table, num_keys), visual, scale),
        (num_keys * num_kv_heads + num_queries * num_heads) * head_size * 2 + num_visual * 4,
    )


def copy_slots_case(num_tokens: int, num_layers: int, device: torch.device) -> Case:
    num_heads, block_size, content = 8, 16, 256
    blocks = -(-num_tokens // block_size)
    # One token in two of those that are there.
    shape = 2 * blocks, num_heads, block_size, content
    sources = PagedCaches.of([torch.randn(shape, device=device).bfloat16() for _ in range(num_layers)])
    destinations = PagedCaches.of([torch.zeros_like(cache[:blocks]) for cache in sources.caches])
    read = torch.arange(num_tokens, device=device) * 2
    batch = sources, destinations, read, torch.arange(num_tokens, device=device)
    return Case(
        f"copy_slots, {num_tokens} tokens, {num_layers} layers",
        lambda: launch_copy_slots(*batch),
        lambda: copy_slots_reference(*batch),
        2 * num_tokens * num_layers * num_heads * content * 2,
    )


def mxfp4_matrix(height: int, width: int, device: torch.device) -> Matrix:
    return Matrix(
        torch.randint(-(2**31), 2**31 - 1, (height // 16, 2 * width), device=device, dtype=torch.int32),
        torch.randint(116, 121, (height // 32, width), device=device).to(torch.uint8),
    )


def random_norm(width: int, device: torch.device) -> Norm:
    return Norm((0.5 + torch.rand(width, device=device)).bfloat16(), 1e-6)


def mxfp4_matvec_case(height: int, width: int, device: torch.device) -> Case:
    matrix, workspace = mxfp4_matrix(height, width, device), Workspace(device)
    x = launch_shrink(torch.randn(1, height, device=device).bfloat16(), random_norm(height, device))
    return Case(
        f"mxfp4_matvec, {height} x {width}",
        lambda: launch_mxfp4_matvec(x, matrix, workspace),
        lambda: mxfp4_matvec_reference(x, matrix),
        height * width // 2 + height * width // 32,
    )


class Shape(NamedTuple):
    """A text model's."""

    num_layers: int
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_size: int = 128


MODELS = {
    "7B": Shape(28, 3584, 18944, 28, 4),
    "3B": Shape(36, 2048, 11008, 16, 2),
    "1.5B": Shape(28, 1536, 8960, 12, 2),
    "0.5B": Shape(24, 896, 4864, 14, 2, head_size=64),
}


class Cached(NamedTuple):
    """Rows of one more token each than `caches` have."""

    heads: Heads
    cos_sin: torch.Tensor
    caches: list[torch.Tensor]
    rows: Rows

    @property
    def num_bytes(self) -> int:
        num_rows, (length, size) = len(self.rows.slots), self.cos_sin.shape
        return num_rows * ((length + 1) * self.heads.num_keys * 2 + self.heads.num_queries * 2) * size * 2


def cached(num_rows: int, context: int, shape: Shape, device: torch.device) -> Cached:
    block_size, size, num_kv_heads = 16, shape.head_size, shape.num_kv_heads
    blocks = -(-context // block_size)
    pages = num_rows * blocks, block_size, num_kv_heads, 2 * size
    caches = [torch.randn(pages, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(shape.num_layers)]
    table = torch.randperm(num_rows * blocks, device=device).int().view(num_rows, blocks)
    angles = torch.rand(context, size // 2, device=device) * 6
    place = context - 1
    rows = Rows(
        torch.full((num_rows,), place, device=device),
        table[:, place // block_size].long() * block_size + place % block_size,
        torch.full((num_rows,), context, device=device, dtype=torch.int32),
        table,
    )
    heads = Heads(shape.num_heads, num_kv_heads, size, size**-0.5)
    return Cached(heads, torch.cat([angles.cos(), angles.sin()], dim=-1).bfloat16(), caches, rows)


def decode_attention_case(num_rows: int, context: int, shape: Shape, device: torch.device) -> Case:
    heads, cos_sin, (cache,), rows = found = cached(num_rows, context, shape._replace(num_layers=1), device)
    width = (heads.num_queries + 2 * heads.num_keys) * heads.size
    qkv = torch.randn(num_rows, width, device=device, dtype=torch.bfloat16)
    workspace = Workspace(device)
    of_keys = f"{context} x {heads.num_keys} keys of {heads.size}"
    return Case(
        f"decode_attention, {num_rows} x {heads.num_queries} queries, {of_keys}",
        lambda: launch_decode_attention(qkv, heads, cos_sin, cache, rows, workspace),
        lambda: decode_attention_reference(qkv, heads, cos_sin, cache, rows),
        found.num_bytes,
    )


def layers_of(shape: Shape, found: Cached, device: torch.device) -> list[Layer]:
    """Random ones, with what is cached."""
    heads, cos_sin, caches, _ = found
    width = shape.num_heads * heads.size
    sizes = {
        "qkv": (shape.hidden, width + 2 * shape.num_kv_heads * heads.size),
        "output": (width, shape.hidden),
        "gate_up": (shape.hidden, 2 * shape.inner),
        "down": (shape.inner, shape.hidden),
    }
    return [
        Layer(
            attention_norm=random_norm(shape.hidden, device), heads=heads, cos_sin=cos_sin, cache=cache,
            mlp_norm=random_norm(shape.hidden, device),
            **{name: mxfp4_matrix(*size, device) for name, size in sizes.items()},
        )
        for cache in caches
    ]  # fmt: skip


def token_layers_case(name: str, shape: Shape, context: int, overlaps: bool, device: torch.device) -> Case:
    """Products loop as often as is fastest, as at an engine's start."""
    found = cached(1, context, shape, device)
    layers, rows = layers_of(shape, found, device), found.rows
    token = TokenLayers(layers, Workspace(device))
    token.overlaps = overlaps
    if device.type == "cuda":
        token.tune(lambda run: float(triton.testing.do_bench_cudagraph(run, rep=5)) / 1e3)
    stream = torch.randn(1, shape.hidden, device=device).bfloat16()
    matrices = [matrix for layer in layers for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    return Case(
        f"token through {shape.num_layers} layers of {name}, {context} before{', overlapping' * overlaps}",
        lambda: token.through(stream, rows),
        lambda: token_layers_reference(layers, stream, rows),
        sum(matrix.weight.nbytes + matrix.scales.nbytes for matrix in matrices) + shape.num_layers * found.num_bytes,
        in_graph=True,
    )


def greedy_head_case(num_tokens: int, width: int, in_eight: bool, device: torch.device) -> Case:
    """In bfloat16, or `in_eight` bits."""
    head = Head(0.1 * torch.randn(num_tokens, width, device=device, dtype=torch.bfloat16))
    head = in_eight_bits(head) if in_eight else head
    x = torch.randn(1, width, device=device).bfloat16()
    norm, workspace = Norm(torch.ones(width, device=device).bfloat16(), 1e-6), Workspace(device)
    return Case(
        f"greedy_head, {num_tokens} x {width}, {'e4m3' if in_eight else 'bfloat16'}",
        lambda: launch_greedy_head(x, head, num_tokens, workspace, norm),
        lambda: greedy_head_reference(x, head, num_tokens, norm),
        head.num_bytes,
    )


def silu_and_mul_case(num_rows: int, width: int, device: torch.device) -> Case:
    x = torch.randn(num_rows, 2 * width, device=device).bfloat16()
    return Case(
        f"silu_and_mul, {num_rows} x {width}",
        lambda: launch_silu_and_mul(x),
        lambda: silu_and_mul_reference(x),
        num_rows * width * 6,
    )


def cases(device: torch.device) -> Iterator[Case]:
    """One at a time, for together they may not fit."""
    large = device.type == "cuda"
    videos = [(1, 12544), (8, 12544), (32, 3136)] if large else [(1, 784), (4, 196)]
    attentions = [(64, 25088, 12544, 40, 8), (64, 25088, 12544, 5, 1)] if large else [(16, 1568, 784, 8, 2)]
    copies = [(10, 64), (1250, 64)] if large else [(125, 4)]
    matrices = [(3584, 4608), (3584, 37888), (18944, 3584)] if large else [(256, 512)]
    models = MODELS if large else {"a small model": Shape(2, 128, 192, 2, 1)}
    context = 1300 if large else 65
    tokens = [(1, "7B"), (1, "3B"), (8, "7B"), (1, "0.5B")] if large else [(1, "a small model")]
    heads = [(VOCABULARY, width) for width in (3584, 2048, 1536, 896)] if large else [(1500, 128)]
    widths = (False, True) if reads_e4m3(device) else (False,)
    can_overlap = large and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    yield from (relevance_case(n, 10, visual, 3584, device) for n, visual in videos)
    yield from (acceptance_case(n, 10, device) for n in (1, 32, 256))
    yield from (advance_decode_case(n, device) for n in (1, 256))
    yield from (attention_mass_case(*sizes, device) for sizes in attentions)
    yield from (copy_slots_case(*sizes, device) for sizes in copies)
    yield from (mxfp4_matvec_case(*sizes, device) for sizes in matrices)
    yield from (decode_attention_case(num_rows, context, models[name], device) for num_rows, name in tokens)
    yield from (greedy_head_case(*sizes, in_eight, device) for sizes in heads for in_eight in widths)
    yield silu_and_mul_case(1, 18944, device)
    for name, shape in models.items():
        for overlaps in (False, True)[: 1 + can_overlap]:
            yield token_layers_case(name, shape, context, overlaps, device)


def seconds(call: Callable[[], object], device: torch.device, in_graph: bool = False) -> float:
    """Median over repeated calls."""
    if device.type == "cuda":
        bench = triton.testing.do_bench_cudagraph if in_graph else triton.testing.do_bench
        return float(bench(call, return_mode="median")) / 1e3
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPY_BYTES / seconds(lambda: target.copy_(source), device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, references alone"
    table = Table(title=f"{name}: a copy moves {bandwidth / 1e9:.0f} GB/s; torch {torch.__version__}")
    for column in ("kernel", "reference, µs", "kernel, µs", "of a copy's bandwidth"):
        table.add_column(column)
    for case in cases(device):
        reference = seconds(case.reference, device)
        if device.type == "cuda":
            taken = seconds(case.launch, device, case.in_graph)
            row = f"{taken * 1e6:.1f}", f"{case.num_bytes / taken / bandwidth:.1%}"
        else:
            row = "–", "–"
        table.add_row(case.name, f"{reference * 1e6:.1f}", *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
