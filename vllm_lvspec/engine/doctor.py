"""`lvspec doctor`: what `vllm serve` with these arguments would use, whether it fits, and why not."""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_lvspec import __version__
from vllm_lvspec.config import METHOD, SELF, LVSpecConfig, LVSpecConfigError
from vllm_lvspec.draft.pairs import default_draft_model
from vllm_lvspec.engine.versions import TESTED, installed_vllm, is_tested_vllm

if TYPE_CHECKING:  # in a vLLM that was not tested these might fail, before anybody is told which one would be right
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

FINE, REFUSED, TOO_LARGE, WRONG_VERSION, UNKNOWN = 0, 2, 3, 4, 5  # exit codes
GIB = 1 << 30
PACKAGES = ("torch", "triton", "transformers", "pydantic")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
# Names of tensors: of a visual encoder, which may be whole on each rank, and of layers that are quantised as they load.
ENCODER = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|image_newline)(\.|$)")
LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
# Bits of a weight so quantised, scales of blocks among them; other methods are for experts alone, or name no size.
QUANTISED_BITS = {
    "fp8": 8.0, "fp8_per_tensor": 8.0, "fp8_per_block": 8.0, "fp8_per_channel": 8.0, "mxfp8": 8.25, "mxfp4": 4.25,
}  # fmt: skip
ACTIVATIONS = 0.1  # of the memory that vLLM may use: what a forward and CUDA graphs take, roughly


@dataclass(frozen=True)
class Part:
    """What takes memory on each rank. `num_bytes` is None where it is not known before the weights are there."""

    name: str
    num_bytes: int | None
    why: str


@dataclass(frozen=True)
class Fit:
    """`parts`, and what is `left` of `memory` for the target's KV cache and the features beside it.

    `free`: what the device has at the moment; `fixed`: the size of that KV cache, where the user has set one; features
    come on top of it.
    """

    parts: list[Part]
    memory: int
    free: int
    fixed: int | None
    bytes_per_token: int
    feature_bytes_per_token: int

    @property
    def left(self) -> int | None:
        known = [part.num_bytes for part in self.parts if part.num_bytes is not None]
        return None if len(known) < len(self.parts) else max(0, self.memory - sum(known))

    @property
    def num_tokens(self) -> int | None:
        """Of all requests together, that the target's KV cache would hold; None where sizes are unknown."""
        if self.left is None:
            return None
        room = self.left // (self.bytes_per_token + self.feature_bytes_per_token)
        return room if self.fixed is None else min(room, self.fixed // self.bytes_per_token)


def examine(arguments: Sequence[str], console: Console) -> int:
    """Print what `vllm serve ARGUMENTS` would do with lvspec, and return an exit code."""
    _print_versions(console)
    if not is_tested_vllm():
        console.print(f"[red]✗[/] vllm {installed_vllm()}: lvspec works with vllm{TESTED}; install such a version")
        return WRONG_VERSION
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_lvspec.engine.arguments import lvspec_config, lvspec_settings, teach_engine_args

    teach_engine_args()
    _print_device(console)
    arguments = list(arguments)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    if parsed.speculative_config is None and parsed.spec_method is None:
        arguments += ["--speculative-config", METHOD]
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    if parsed.model_tag is not None:
        parsed.model = parsed.model_tag
    try:
        vllm_config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(UsageContext.OPENAI_API_SERVER)
        if lvspec_settings(vllm_config) is None:
            raise LVSpecConfigError(f"speculative_config={parsed.speculative_config!r}: must be {METHOD}, or name it")
        config = lvspec_config(vllm_config)
        fit = memory_fit(vllm_config, config)
        _print_use(console, vllm_config, config)
    except (LVSpecConfigError, ValueError, OSError, NotImplementedError) as error:
        console.print("[red]✗[/] refused:", escape(" ".join(str(error).split())), highlight=False, soft_wrap=True)
        return REFUSED
    code = _print_fit(console, vllm_config.model_config.max_model_len, fit)
    console.print(f"\nvllm serve {shlex.join(arguments)}", highlight=False, markup=False, soft_wrap=True)
    return code


def _print_versions(console: Console) -> None:
    versions = [f"vllm-lvspec {__version__}", f"vllm {installed_vllm()}", f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} missing")
    console.print(", ".join(versions), highlight=False)


def _print_device(console: Console) -> None:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            console.print(
                f"GPU {i}: {found.name}, compute capability {found.major}.{found.minor}, {free / GIB:.1f} of "
                f"{total / GIB:.1f} GiB free",
                highlight=False,
            )
    else:
        memory = psutil.virtual_memory()
        console.print(
            f"no GPU: {len(os.sched_getaffinity(0))} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} "
            "GiB free",
            highlight=False,
        )


def _print_use(console: Console, vllm_config: VllmConfig, config: LVSpecConfig) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    model = vllm_config.model_config
    with set_current_vllm_config(vllm_config):
        backend = get_attn_backend(model.get_head_size(), model.dtype, vllm_config.cache_config.cache_dtype)
    table = Table(show_header=False, box=None)
    table.add_row("target", escape(model.model), f"{model.architecture}, {model.dtype}".replace("torch.", ""))
    known = default_draft_model(model.model)
    if config.model == SELF:
        why = "the target's own weights" + ("" if known else "; no partner of it is known")
    else:
        why = "the target's known partner, or the folder beside it" if config.model == known else "as named"
    table.add_row("drafter", escape(str(config.model)), why)
    table.add_row("tokens a step", str(config.num_speculative_tokens), f"at most; {config.draft_length}")
    view = f"{config.pruning}, {config.pruning_ratio:.0%} of a video pruned"
    table.add_row("drafter's view", view, "images are seen whole")
    lossy = f"relaxation {config.relaxation:g}; answers may differ from the target's" if config.is_lossy else "lossless"
    table.add_row("policy", config.policy, lossy)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    engines = vllm_config.parallel_config.data_parallel_size
    table.add_row("attention", backend.get_name(), f"tensor parallel {ranks}" + f", {engines} engines" * (engines > 1))
    table.add_row("runner", "V1, without asynchronous scheduling", "as vLLM runs custom proposers")
    console.print(table)


def _print_fit(console: Console, longest: int, fit: Fit) -> int:
    table = Table(title="memory per rank", title_justify="left", box=None, show_header=False)
    for part in fit.parts:
        size = "unknown" if part.num_bytes is None else f"{part.num_bytes / GIB:.3f} GiB"
        table.add_row(part.name, size, escape(part.why))
    table.add_row("of", f"{fit.memory / GIB:.3f} GiB", "that vLLM may use" if fit.fixed is None else "that is free")
    console.print(table)
    if fit.memory > fit.free:
        console.print(
            f"[red]✗[/] vLLM would take {fit.memory / GIB:.3f} GiB, and {fit.free / GIB:.3f} are free: lower "
            "gpu_memory_utilization (on CPUs, too), or end what takes the rest",
            highlight=False,
        )
        return TOO_LARGE
    if fit.num_tokens is None:
        console.print("[yellow]![/] whether it fits can't be told: the size of weights is unknown", highlight=False)
        return UNKNOWN
    cache = fit.num_tokens * fit.bytes_per_token / GIB
    if fit.num_tokens < longest:
        console.print(
            f"[red]✗[/] there is room for a KV cache of {cache:.3f} GiB, {fit.num_tokens} tokens; one request may have "
            f"max_model_len={longest}: lower it or draft_cache_gib, or spread the model over more devices",
            highlight=False,
        )
        return TOO_LARGE
    features = fit.num_tokens * fit.feature_bytes_per_token / GIB
    console.print(
        f"[green]✓[/] fits: KV cache of {cache:.3f} GiB, {fit.num_tokens} tokens"
        + (f", and {features:.3f} GiB for features of visual tokens" if features else ""),
        highlight=False,
    )
    return FINE


def memory_fit(vllm_config: VllmConfig, config: LVSpecConfig) -> Fit:
    """What target, drafter and caches would take on each rank, without loading them."""
    from vllm.utils.torch_utils import get_dtype_size, kv_cache_dtype_str_to_dtype

    from vllm_lvspec.engine.compatibility import (
        draft_model_config,
        draft_parallel_config,
        fit_encoder,
        num_draft_ranks,
    )
    from vllm_lvspec.engine.memory import default_cache_bytes, device_memory, logits_bytes, waiting_bytes
    from vllm_lvspec.kernels.greedy_head import reads_e4m3

    target, cache = vllm_config.model_config, vllm_config.cache_config
    size, folder = vllm_config.parallel_config.tensor_parallel_size, vllm_config.load_config.download_dir
    draft = target if config.model == SELF else draft_model_config(target, config)
    memory, free = device_memory(size)
    parts, num_ranks = [_weights("target", target, size, folder)], size
    if config.model != SELF:
        num_ranks = num_draft_ranks(vllm_config, draft, config)
        fit_encoder(draft, num_ranks)
        drafter = _weights("drafter", draft, num_ranks, folder)
        if num_ranks < size:
            drafter = replace(drafter, why=f"whole on each rank{', ' * bool(drafter.why)}{drafter.why}")
        parts.append(drafter)
    block = cache.block_size or 16
    blocks = -(-min(draft.max_model_len, target.max_model_len) // block) * vllm_config.scheduler_config.max_num_seqs
    per_block = (
        block * _cache_entries(draft, draft_parallel_config(vllm_config, num_ranks)) * get_dtype_size(draft.dtype)
    )
    if config.draft_cache_gib is not None:
        draft_cache, why = int(config.draft_cache_gib * GIB), "draft_cache_gib"
    else:
        draft_cache = default_cache_bytes(blocks, per_block, memory)
        why = "for all requests, or as much as there is room"
    embeddings, at_most = int(config.embedding_cache_gib * GIB), "embedding_cache_gib, at most"
    if torch.cuda.is_available() and not (config.model == SELF and config.self_cache == "copy"):
        embeddings += waiting_bytes(draft, draft_cache // per_block * block)
        at_most += ", and those of prompts that wait"
        device = torch.device("cuda")
        if draft.quantization == "mxfp4" and num_ranks == 1 and draft.dtype == torch.bfloat16 and reads_e4m3(device):
            head = draft.get_vocab_size() * draft.get_hidden_size()
            parts.append(Part("drafter's head in eight bits", head, "if that is faster"))
    parts += [
        Part("drafter's KV cache", draft_cache, why),
        Part("drafter's visual embeddings", embeddings, at_most),
    ]
    allowed = int(cache.gpu_memory_utilization * memory)
    if torch.cuda.is_available():
        logits, activations = logits_bytes(vllm_config, memory), int(ACTIVATIONS * allowed)
        why = "a tenth, roughly" if activations > logits else "logits of drafts"
        parts.append(Part("activations", max(activations, logits), f"{why}; vLLM measures it"))
    return Fit(
        parts,
        allowed if cache.kv_cache_memory_bytes is None else free,
        free,
        cache.kv_cache_memory_bytes,
        _cache_entries(target, vllm_config.parallel_config)
        * get_dtype_size(kv_cache_dtype_str_to_dtype(cache.cache_dtype, target)),
        _feature_bytes(target, config, size),
    )


def _cache_entries(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Numbers that a token has in a rank's KV cache."""
    return 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * model.get_num_layers(parallel)


def _feature_bytes(target: ModelConfig, config: LVSpecConfig, num_ranks: int) -> int:
    from vllm.utils.torch_utils import get_dtype_size

    from vllm_lvspec.draft.pruning import STRATEGIES
    from vllm_lvspec.verify.policies import POLICIES
    from vllm_lvspec.verify.sources import AnchorSource

    uses = POLICIES[config.policy].uses_relevance or STRATEGIES[config.pruning].looks_at == "similarity"
    if not uses or AnchorSource.parse(config.anchor_source).kind == "value":
        return 0
    width = config.anchor_projection or target.get_hidden_size()
    return -(-width * get_dtype_size(target.dtype) // num_ranks)


def _weights(name: str, model: ModelConfig, num_ranks: int, cache_dir: str | None) -> Part:
    """What a rank has of them."""
    shared = [f"shared by {num_ranks} ranks"] if num_ranks > 1 else []
    if model.quantization:
        shared.append(f"{model.quantization} when loaded")
    tensors = _tensors(model.model, model.revision, cache_dir)
    if tensors is None:
        found = weight_bytes(model.model, model.revision, cache_dir)
        if found is None:
            return Part(f"{name}'s weights", None, f"{model.model} is not on this machine, and its hub is out of reach")
        return Part(f"{name}'s weights", found // num_ranks, ", ".join(["as on disk", *shared]))
    # Of the language model as it is loaded, where its checkpoint is not quantised.
    bits = QUANTISED_BITS.get(model.quantization or "") if model.model_arch_config.quantization_config is None else None
    is_whole = model.multimodal_config is not None and model.multimodal_config.mm_encoder_tp_mode == "data"
    if is_whole and num_ranks > 1:
        shared.append("but for its visual encoder")
    num_bytes = 0.0
    for key, info in tensors.items():
        size = info.data_offsets[1] - info.data_offsets[0]
        is_encoder = ENCODER.search(key) is not None
        if info.dtype in ("F32", "F16", "BF16"):  # loaded as the model's own
            size = info.parameter_count * model.dtype.itemsize
            if bits is not None and not is_encoder and LINEAR.search(key):
                size = info.parameter_count * bits / 8
        num_bytes += size if is_encoder and is_whole else size / num_ranks
    return Part(f"{name}'s weights", int(num_bytes), ", ".join(shared))


def _tensors(model: str, revision: str | None, cache_dir: str | None) -> dict[str, Any] | None:
    """What is in a checkpoint's files, by name, where that can be read without loading it."""
    from huggingface_hub import HfApi, get_local_safetensors_metadata, snapshot_download

    def of_cache() -> Any:
        return get_local_safetensors_metadata(
            snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True)
        )

    def of_hub() -> Any:
        return HfApi().get_safetensors_metadata(model, revision=revision)

    of_folder = functools.partial(get_local_safetensors_metadata, model)
    for read in [of_folder] if Path(model).is_dir() else [of_cache, of_hub]:
        try:
            files = read().files_metadata.values()
        except Exception:  # other files, none here, out of reach, or no name of the hub: each has errors of its own
            continue
        return {key: info for file in files for key, info in file.tensors.items()}
    return None


def weight_bytes(model: str, revision: str | None = None, cache_dir: str | None = None) -> int | None:
    """Size of a checkpoint's files of weights: of a folder, as the hub says, or of the hub's cache; else None."""
    if (folder := Path(model)).is_dir():
        return _of_one_format({file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()})
    from huggingface_hub import HfApi, snapshot_download

    try:
        files: Any = HfApi().model_info(model, revision=revision, files_metadata=True).siblings or []
        return _of_one_format({file.rfilename: file.size or 0 for file in files})
    except Exception:  # offline, out of reach, or no name of the hub: each has errors of its own
        pass
    try:
        folder = Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except Exception:
        return None
    return _of_one_format({file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()})


def _of_one_format(sizes: dict[str, int]) -> int | None:
    """Of several formats vLLM takes one; files in folders below belong to something else."""
    for pattern in WEIGHTS:
        if found := [size for name, size in sizes.items() if "/" not in name and fnmatch(name, pattern)]:
            return sum(found)
    return None
