"""Compile every kernel without a GPU: `python compile_for.py cuda:90 hip:gfx942`; prints the size of each binary."""

import re
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from vllm_lvspec.kernels.acceptance import _accept_kernel
from vllm_lvspec.kernels.advance_decode import _advance_decode_kernel
from vllm_lvspec.kernels.attention_mass import _attention_mass_kernel, _join_log_sums_kernel, _log_sums_kernel
from vllm_lvspec.kernels.copy_slots import _copy_slots_kernel
from vllm_lvspec.kernels.decode_attention import _decode_attention_kernel
from vllm_lvspec.kernels.greedy_head import _BLOCK_H, _EXACT_H, _greedy_head_kernel
from vllm_lvspec.kernels.mxfp4_matvec import _mxfp4_matvec_kernel, _shrink_kernel
from vllm_lvspec.kernels.relevance import _mean_of_top_kernel, _top_cosines_kernel
from vllm_lvspec.kernels.silu_and_mul import _silu_and_mul_kernel

KERNELS = {
    "accept": ASTSource(
        fn=_accept_kernel,
        signature={
            "token_ids_ptr": "*i32",
            "reasons_ptr": "*i8",
            "sources_ptr": "*i16",
            "draft_ids_ptr": "*i32",
            "target_ids_ptr": "*i32",
            "bonus_ids_ptr": "*i32",
            "starts_ptr": "*i32",
            "exact_ptr": "*i1",
            "relevance_ptr": "*fp32",
            "relative_probs_ptr": "*fp32",
            "num_fillers_ptr": "*i32",
            "thresholds_ptr": "*fp32",
            "probability_floors_ptr": "*fp32",
            "windows_ptr": "*i32",
            "guards_ptr": "*i32",
            "stop_ids_ptr": "*i32",
            "num_stops": "i32",
            "kinds_ptr": "*u8",
            "ends_ptr": "*i1",
            "max_drafted": "i32",
            "BACK_ONLY": "constexpr",
            "BLOCK": "constexpr",
        },
        constexprs={"BACK_ONLY": False, "BLOCK": 16},
    ),
    "advance_decode": ASTSource(
        fn=_advance_decode_kernel,
        signature={
            "positions_ptr": "*i64",
            "positions_stride": "i32",
            "seq_lens_ptr": "*i32",
            "slots_ptr": "*i64",
            "block_table_ptr": "*i32",
            "block_table_stride": "i32",
            "num_rows": "i32",
            "num_dims": "i32",
            "PAGE_SIZE": "constexpr",
            "BLOCK": "constexpr",
        },
        constexprs={"PAGE_SIZE": 16, "BLOCK": 128},
    ),
    **{
        f"log_sums_{dtype}": ASTSource(
            fn=_log_sums_kernel,
            signature={
                "log_sums_ptr": "*fp32",
                "queries_ptr": f"*{dtype}",
                "queries_stride": "i32",
                "queries_head_stride": "i32",
                "query_positions_ptr": "*i32",
                "keys_ptr": f"*{dtype}",
                "keys_block_stride": "i32",
                "keys_head_stride": "i32",
                "keys_slot_stride": "i32",
                "block_table_ptr": "*i32",
                "num_queries": "i32",
                "group": "i32",
                "head_size": "i32",
                "block_size": "i32",
                "scale": "fp32",
                "BLOCK_R": "constexpr",
                "BLOCK_K": "constexpr",
                "BLOCK_D": "constexpr",
                "INTERPRETED": "constexpr",
            },
            constexprs={"BLOCK_R": tile, "BLOCK_K": tile, "BLOCK_D": 128, "INTERPRETED": False},
        )
        for dtype, tile in (("bf16", 64), ("fp16", 64), ("fp32", 32))
    },
    "join_log_sums": ASTSource(
        fn=_join_log_sums_kernel,
        signature={
            "joined_ptr": "*fp32",
            "log_sums_ptr": "*fp32",
            "count": "i32",
            "NUM_SPLITS": "constexpr",
            "BLOCK": "constexpr",
        },
        constexprs={"NUM_SPLITS": 32, "BLOCK": 32},
    ),
    **{
        f"attention_mass_{dtype}": ASTSource(
            fn=_attention_mass_kernel,
            signature={
                "masses_ptr": "*fp32",
                "log_sums_ptr": "*fp32",
                "queries_ptr": f"*{dtype}",
                "queries_stride": "i32",
                "queries_head_stride": "i32",
                "query_positions_ptr": "*i32",
                "keys_ptr": f"*{dtype}",
                "keys_block_stride": "i32",
                "keys_head_stride": "i32",
                "keys_slot_stride": "i32",
                "block_table_ptr": "*i32",
                "visual_positions_ptr": "*i32",
                "num_queries": "i32",
                "num_visual": "i32",
                "group": "i32",
                "head_size": "i32",
                "block_size": "i32",
                "scale": "fp32",
                "BLOCK_R": "constexpr",
                "BLOCK_V": "constexpr",
                "BLOCK_D": "constexpr",
                "INTERPRETED": "constexpr",
            },
            constexprs={"BLOCK_R": tile, "BLOCK_V": tile, "BLOCK_D": 128, "INTERPRETED": False},
        )
        for dtype, tile in (("bf16", 64), ("fp16", 64), ("fp32", 32))
    },
    **{
        f"copy_slots_{num_bytes}": ASTSource(
            fn=_copy_slots_kernel,
            signature={
                "sources_ptr": "*i64",
                "source_block_stride": "i32",
                "source_head_stride": "i32",
                "source_slot_stride": "i32",
                "destinations_ptr": "*i64",
                "destination_block_stride": "i32",
                "destination_head_stride": "i32",
                "destination_slot_stride": "i32",
                "source_slots_ptr": "*i64",
                "destination_slots_ptr": "*i64",
                "num_tokens": "i32",
                "num_heads": "i32",
                "block_size": "i32",
                "content": "i32",
                "BYTES": "constexpr",
                "SOURCE_ALIGNMENT": "constexpr",
                "DESTINATION_ALIGNMENT": "constexpr",
                "BLOCK_R": "constexpr",
                "BLOCK_C": "constexpr",
            },
            constexprs={
                "BYTES": num_bytes,
                "SOURCE_ALIGNMENT": 16,
                "DESTINATION_ALIGNMENT": 16,
                "BLOCK_R": 16,
                "BLOCK_C": 256,
            },
        )
        for num_bytes in (1, 2, 4)
    },
    **{
        f"decode_attention_{dtype}_{half}{'_of_norms' * has_norm}{'_overlapping' * overlaps}": ASTSource(
            fn=_decode_attention_kernel,
            signature={
                "qkv_ptr": f"*{dtype}",
                "out_ptr": "*fp16",
                "positions_ptr": "*i64",
                "cos_sin_ptr": f"*{dtype}",
                "cos_sin_stride": "i32",
                "query_norm_ptr": f"*{dtype}",
                "key_norm_ptr": f"*{dtype}",
                "eps": "fp32",
                "cache_ptr": f"*{dtype}",
                "page_stride": "i64",
                "head_stride": "i32",
                "token_stride": "i32",
                "block_table_ptr": "*i32",
                "block_table_stride": "i32",
                "seq_lens_ptr": "*i32",
                "slots_ptr": "*i64",
                "parts_ptr": "*fp32",
                "arrived_ptr": "*i32",
                "num_splits": "i32",
                "scale": "fp32",
                "GROUP": "constexpr",
                "MEMBERS": "constexpr",
                "HALF": "constexpr",
                "PAGE_SIZE": "constexpr",
                "HAS_NORM": "constexpr",
                "BLOCK_G": "constexpr",
                "BLOCK_K": "constexpr",
                "SPLITS": "constexpr",
                "MOST_JOINED": "constexpr",
                "INTERPRETED": "constexpr",
                "OVERLAPS": "constexpr",
            },
            constexprs={
                "GROUP": 7,
                "MEMBERS": 4,
                "HALF": half,
                "PAGE_SIZE": 16,
                "HAS_NORM": has_norm,
                "BLOCK_G": 16,
                "BLOCK_K": 32 if dtype == "fp32" else 64,
                "SPLITS": 16,
                "MOST_JOINED": 8192,
                "INTERPRETED": False,
                "OVERLAPS": overlaps,
            },
        )
        for dtype, half, has_norm, overlaps in (
            ("bf16", 64, False, False),
            ("bf16", 32, False, False),
            ("bf16", 128, False, False),
            ("bf16", 64, True, False),
            ("fp16", 64, False, False),
            ("fp32", 64, False, False),
            ("bf16", 64, True, True),
        )
    },
    **{
        f"top_cosines_{dtype}": ASTSource(
            fn=_top_cosines_kernel,
            signature={
                "tops_ptr": "*fp32",
                "queries_ptr": f"*{dtype}",
                "queries_stride": "i32",
                "query_starts_ptr": "*i32",
                "features_ptr": f"*{dtype}",
                "features_block_stride": "i32",
                "features_slot_stride": "i32",
                "features_head_stride": "i32",
                "block_table_ptr": "*i32",
                "block_table_stride": "i32",
                "visual_positions_ptr": "*i32",
                "visual_starts_ptr": "*i32",
                "num_queries": "i32",
                "width": "i32",
                "head_size": "i32",
                "block_size": "i32",
                "TOP": "constexpr",
                "BLOCK_Q": "constexpr",
                "BLOCK_V": "constexpr",
                "BLOCK_D": "constexpr",
                "INTERPRETED": "constexpr",
            },
            constexprs={"TOP": 16, "BLOCK_Q": 16, "BLOCK_V": 64, "BLOCK_D": 64, "INTERPRETED": False},
        )
        for dtype in ("bf16", "fp16", "fp32")
    },
    "mean_of_top": ASTSource(
        fn=_mean_of_top_kernel,
        signature={
            "relevance_ptr": "*fp32",
            "tops_ptr": "*fp32",
            "num_queries": "i32",
            "num_splits": "i32",
            "top_n": "i32",
            "NUM_SPLITS": "constexpr",
            "TOP": "constexpr",
        },
        constexprs={"NUM_SPLITS": 16, "TOP": 16},
    ),
    **{
        f"greedy_head_{weights}_{width}": ASTSource(
            fn=_greedy_head_kernel,
            signature={
                "x_ptr": "*bf16",
                "norm_ptr": "*bf16",
                "weight_ptr": f"*{weights}",
                "scales_ptr": "*fp32",
                "exact_ptr": "*bf16",
                "token_ptr": "*i64",
                "prob_ptr": "*fp32",
                "parts_ptr": "*fp32",
                "arrived_ptr": "*i32",
                "num_tokens": "i32",
                "eps": "fp32",
                "WIDTH": "constexpr",
                "HAS_NORM": "constexpr",
                "HAS_SCALES": "constexpr",
                "BLOCK_V": "constexpr",
                "BLOCK_H": "constexpr",
                "EXACT_H": "constexpr",
                "BLOCK_P": "constexpr",
                "NUM_STAGES": "constexpr",
                "NUM_CANDIDATES": "constexpr",
            },
            constexprs={
                "WIDTH": width,
                "HAS_NORM": True,
                "HAS_SCALES": weights != "bf16",
                "BLOCK_V": 32,
                "BLOCK_H": _BLOCK_H,
                "EXACT_H": _EXACT_H,
                "BLOCK_P": 1024,
                "NUM_STAGES": 4,
                "NUM_CANDIDATES": 4,
            },
        )
        for weights, width in (("bf16", 3584), ("fp8e4nv", 3584), ("fp8e4nv", 2048), ("fp8e4nv", 896))
    },
    "shrink": ASTSource(
        fn=_shrink_kernel,
        signature={
            "x_ptr": "*bf16",
            "norm_ptr": "*bf16",
            "shrunk_ptr": "*fp16",
            "squares_ptr": "*fp32",
            "width": "i32",
            "BLOCK": "constexpr",
        },
        constexprs={"BLOCK": 4096},
    ),
    **{
        f"silu_and_mul_{dtype}": ASTSource(
            fn=_silu_and_mul_kernel,
            signature={
                "x_ptr": f"*{dtype}",
                "x_stride": "i32",
                "out_ptr": f"*{dtype}",
                "width": "i32",
                "BLOCK": "constexpr",
            },
            constexprs={"BLOCK": 1024},
        )
        for dtype in ("bf16", "fp16", "fp32")
    },
}

# Eight bits a weight are what NVIDIA's GPUs have from sm_89 on.
FEWEST = {f"greedy_head_fp8e4nv_{width}": 89 for width in (3584, 2048, 896)}

BINARIES = {"cuda": "cubin", "hip": "hsaco"}


def mxfp4_matvec(backend: str, **asked: bool) -> ASTSource:
    signature = {
        "x_ptr": "*i32",
        "squares_ptr": "*fp32",
        "weight_ptr": "*i32",
        "scales_ptr": "*i16",
        "bias_ptr": "*bf16",
        "added_ptr": "*bf16",
        "norm_ptr": "*bf16",
        "out_ptr": "*bf16",
        "shrunk_ptr": "*fp16",
        "out_squares_ptr": "*fp32",
        "parts_ptr": "*fp32",
        "arrived_ptr": "*i32",
        "num_columns": "i32",
        "num_groups": "i32",
        "num_splits": "i32",
        "num_loops": "i32",
        "num_squares": "i32",
        "eps": "fp32",
        "GROUPS": "constexpr",
        "IS_WHOLE": "constexpr",
        "BLOCK_S": "constexpr",
        "IS_SHRUNK": "constexpr",
        "HAS_SQUARES": "constexpr",
        "HAS_BIAS": "constexpr",
        "IS_ADDED": "constexpr",
        "HAS_NORM": "constexpr",
        "IS_GATED": "constexpr",
        "ASM": "constexpr",
        "OVERLAPS": "constexpr",
    }
    aligned = [i for i, name in enumerate(signature) if name.endswith("_ptr") or name == "num_columns"]
    constexprs = {"GROUPS": 8, "IS_WHOLE": asked.pop("IS_WHOLE", True), "BLOCK_S": 16, "ASM": backend == "cuda"}
    asks = ("IS_SHRUNK", "HAS_SQUARES", "HAS_BIAS", "IS_ADDED", "HAS_NORM", "IS_GATED", "OVERLAPS")
    return ASTSource(
        fn=_mxfp4_matvec_kernel,
        signature=signature,
        constexprs=constexprs | {name: asked.get(name, False) for name in asks},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


NORMED = {"IS_SHRUNK": True, "HAS_SQUARES": True}
MATVECS = {
    "alone": {"HAS_BIAS": True},
    "with_an_end": {"IS_WHOLE": False},
    "of_a_norm": {**NORMED, "HAS_BIAS": True},
    "added": {"IS_SHRUNK": True, "IS_ADDED": True},
    "before_a_norm": {"IS_SHRUNK": True, "IS_ADDED": True, "HAS_NORM": True},
    "gated": {**NORMED, "IS_GATED": True},
    "gated_overlapping": {**NORMED, "IS_GATED": True, "OVERLAPS": True},
    "before_a_norm_overlapping": {"IS_SHRUNK": True, "IS_ADDED": True, "HAS_NORM": True, "OVERLAPS": True},
}


# Numbers and strides that 16 divides, as they are in a drafter, decide how memory is read.
for kernel, source in KERNELS.items():
    if kernel.startswith(("decode_attention", "greedy_head")):
        unaligned = ("positions_ptr", "block_table_ptr", "seq_lens_ptr", "slots_ptr", "block_table_stride")
        names = [name for name in source.signature if name.endswith(("_ptr", "_stride")) and name not in unaligned]
        aligned = [list(source.signature).index(name) for name in names]
        source.attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}


def compile_all(name: str) -> None:
    backend, arch = name.split(":")
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    can_overlap = backend == "cuda" and int(arch) >= 90
    for kernel, source in KERNELS.items():
        if kernel.endswith("_overlapping") and not can_overlap:
            continue
        if kernel in FEWEST and (backend != "cuda" or int(arch) < FEWEST[kernel]):
            continue
        compiled = compile(source, target=target)
        print(name, kernel, len(compiled.asm[BINARIES[backend]]))
        if kernel.endswith("_overlapping"):
            waits_behind_its_keys(compiled.asm["ptx"])
        if kernel.startswith("greedy_head") and backend == "cuda":
            reads_ahead(compiled.asm["ttgir"], num_loops=1 + ("fp8" in kernel))
    for kind, asked in MATVECS.items():
        if kind.endswith("_overlapping") and not can_overlap:
            continue
        compiled = compile(mxfp4_matvec(backend, **asked), target=target, options={"num_warps": 1})
        print(name, f"mxfp4_matvec_{kind}", len(compiled.asm[BINARIES[backend]]))
        if backend == "cuda":
            lies_as_tensor_cores_take_it(compiled.asm["ttgir"])
        if kind.endswith("_overlapping"):
            waits_behind_its_weights(compiled.asm["ptx"])


def lies_as_tensor_cores_take_it(ttgir: str) -> None:
    """What they are given lies with the threads that it must lie with, and nothing is moved there first."""
    (weights,) = re.findall(r"tt.elementwise_inline_asm \"{\\0A.*: tensor<128x8xi32, (#\w+)>", ttgir)
    layout = weights + " = #ttg.blocked<{sizePerThread = [4, 1], threadsPerWarp = [32, 1]"
    assert layout in ttgir, ttgir


def waits_behind_its_weights(ptx: str) -> None:
    """All weights and scales are asked for before the kernel before is waited for, and nothing else is."""
    before, _, behind = ptx.partition("griddepcontrol.wait")
    assert before.count("ld.global.v4.b32") == 16 and before.count("ld.global.v2.b32") == 8
    assert before.count("ld.global") == 24 and "st.global" not in before
    assert behind.count("@p ld.global.b32") >= 32


def reads_ahead(ttgir: str, num_loops: int) -> None:
    """What a loop multiplies was asked for three loops before, and is nowhere laid out anew."""
    loops = [loop for loop in re.findall(r"scf\.for.*?scf\.yield", ttgir, re.DOTALL) if "ttg.async_wait" in loop]
    assert len(loops) == num_loops
    for loop in loops:
        assert loop.count("ttg.async_copy_global_to_local") == 3 and "ttg.convert_layout" not in loop, loop
    assert ttgir.count("ttg.async_copy_global_to_local") == 12 * num_loops


def waits_behind_its_keys(ptx: str) -> None:
    """Before it waits it has asked for the first block of keys and values, and written nothing."""
    before, _, behind = ptx.partition("griddepcontrol.wait")
    assert "st.global" not in before and "st.global" in behind
    assert 16 <= before.count("ld.global.v4.b32") <= 18 and behind.count("ld.global") > 16


for name in sys.argv[1:]:
    compile_all(name)
