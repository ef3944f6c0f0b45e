"""Compile every kernel without a GPU: `python compile_for.py cuda 90`; prints the size of each binary."""

import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from vllm_lvspec.kernels.advance_decode import _advance_decode_kernel

KERNELS = {
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
}

backend, arch = sys.argv[1], sys.argv[2]
target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
binary = {"cuda": "cubin", "hip": "hsaco"}[backend]
for name, source in KERNELS.items():
    print(name, len(compile(source, target=target).asm[binary]))
