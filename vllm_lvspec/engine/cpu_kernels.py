"""Two of vLLM 0.32's kernels for CPUs, put right, so that sampling under speculation keeps the target's distribution.

`expand_kernel` writes temperature, top-k and top-p of each request to its drafted tokens; vLLM's version for CPUs
writes into a converted copy unless the values are int64, and what the sampler then reads was never written. The other
kernel takes vLLM's padding (drafted id -1) for a token, reads a probability outside its row, and may accept it. vLLM's
versions for GPUs do neither. Both are replaced where they are launched, as vLLM replaces Triton's kernels on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.triton_utils import HAS_TRITON
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    replace_from: float,
    replace_to: float,
    max_num_tokens: int | None = None,
) -> None:
    """Write `values [num_requests]`, each repeated for its request's drafted tokens, into `output [num_tokens]`.

    `cu_num_tokens [num_requests]` are cumulated counts; values equal to `replace_from` become `replace_to`.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(values == replace_from, torch.as_tensor(replace_to, dtype=values.dtype), values)
    output.copy_(replaced.repeat_interleave(counts))


def rejection_random_sample(
    output_token_ids: torch.Tensor,
    cu_num_draft_tokens: torch.Tensor,
    draft_token_ids: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    recovered_token_ids: torch.Tensor,
    uniform_probs: torch.Tensor,
    *rest: Any,
) -> None:
    """vLLM's kernel with padded drafted ids rejected: no probability reaches an infinite threshold."""
    is_padding = draft_token_ids < 0
    cpu_triton_utils._rejection_random_sample_kernel_impl(
        output_token_ids,
        cu_num_draft_tokens,
        draft_token_ids.clamp(min=0),
        draft_probs,
        target_probs,
        bonus_token_ids,
        recovered_token_ids,
        uniform_probs.masked_fill(is_padding, float("inf")),
        *rest,
    )


def replace_cpu_kernels() -> None:
    """Replace vLLM's versions for good; needless where Triton itself runs on the CPU.

    What launches a kernel is given another one. vLLM's `register_kernels` does that, too, but whoever starts one more
    engine in this process has it done again with vLLM's own; and it fails where llvmlite is among the modules that it
    looks through, which comes with n-gram drafts of an engine beside.
    """
    if HAS_TRITON:
        return
    for launcher, kernel in (
        (rejection_sampler._expand, expand),
        (rejection_sampler._rejection_random_sample, rejection_random_sample),
    ):
        if getattr(launcher.kernel, "func", None) is not kernel:
            launcher.kernel = KernelOverride(launcher.kernel, kernel)
