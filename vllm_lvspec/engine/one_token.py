"""A drafted token through a drafter's layers in five kernels each, with one before and one behind: this package's.

vLLM takes eleven for a layer in four bits: norms, rotary embedding, writing keys and values, attention and joining its
parts, and SwiGLU beside the four products. For a small drafter's single token most of them are more launch than work.
Here a product brings along what it is added to with the norm behind it, or its gate, and attention is one kernel.
Behind the layers the last norm, the head and the choice of a token are one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer
from vllm.platforms import current_platform

from vllm_lvspec.draft.batch import DraftBatch
from vllm_lvspec.draft.drafter import NextTokens
from vllm_lvspec.engine.few_rows import FewRowsSiluAndMul, OneRowLinear
from vllm_lvspec.engine.kv_layout import KVLayout, UnknownLayoutError
from vllm_lvspec.kernels.decode_attention import LEAST_SIZE, Heads, Rows
from vllm_lvspec.kernels.greedy_head import Head, in_eight_bits, launch_greedy_head, reads_e4m3
from vllm_lvspec.kernels.mxfp4_matvec import TILE
from vllm_lvspec.kernels.shared import Norm, Workspace
from vllm_lvspec.kernels.token_layers import Layer, TokenLayers

if TYPE_CHECKING:
    from vllm_lvspec.engine.draft_model import VLLMDraftModel

logger = init_logger("vllm.lvspec")

# What is done here, by the forwards that do it in vLLM.
_LAYERS = (Qwen2DecoderLayer.forward, Qwen3DecoderLayer.forward)
_ATTENTION = (Qwen2Attention.forward, Qwen3Attention.forward)
_TOLERANCE = 0.05  # of what a layer adds: sums are made in another order, and less is rounded
_WHOLE_TOLERANCE = 0.2  # of the last hidden state, to which layers have added what they differ in
_HEAD_TOLERANCE = 0.25  # of logits' deviation: how much less a chosen token may have than the best
_LOG_TOLERANCE = 0.5  # of a chosen token's probability, by its logarithm
_TRIAL_ENDS = 8  # texts of one length that a head is tried with
_TRIAL_TOKENS = 4099  # more than all programs of an attention kernel take at once, and no whole number of blocks


class OneTokenStep(TokenLayers):
    """From the embedding of a request's next token to the decoder's last hidden state, or to the token behind it.

    `norm`: the decoder's last. `head`: what chooses a token, where that is this package's, too, and of how many
    `num_tokens`.
    """

    head: Head | None = None
    num_tokens = 0

    def __init__(self, layers: list[Layer], norm: nn.Module, workspace: Workspace):
        super().__init__(layers, workspace)
        self.norm = norm
        self._last_norm = _norm(norm)

    def __call__(self, stream: torch.Tensor, rows: Rows) -> torch.Tensor:
        """`stream [1, hidden_size]` to `[1, hidden_size]`; its keys and values go into the cache."""
        return self.norm(self.through(stream, rows))

    @property
    def num_bytes(self) -> int:
        """What it keeps beside the model's weights."""
        return self.head.num_bytes if self.head is not None and self.head.scales is not None else 0

    def next_token(self, stream: torch.Tensor, rows: Rows) -> NextTokens:
        """The same, and on to the token that follows."""
        return self.choose(self.through(stream, rows))

    def choose(self, stream: torch.Tensor) -> NextTokens:
        """By the head, of what the last layer gives."""
        assert self.head is not None
        return NextTokens(*launch_greedy_head(stream, self.head, self.num_tokens, self.workspace, self._last_norm))


def decoder_layers(model: Any, caches: Mapping[str, torch.Tensor]) -> list[Layer] | None:
    """Of a vision-language model in vLLM, with the caches of its attention layers by name; None where there is a layer
    that does something else than `OneTokenStep`, or holds its weights otherwise."""
    decoder = getattr(model.get_language_model(), "model", None)
    found = [_layer(module, caches) for module in getattr(decoder, "layers", ())]
    layers = [layer for layer in found if layer is not None]
    return layers if layers and len(layers) == len(found) else None


def _layer(module: Any, caches: Mapping[str, torch.Tensor]) -> Layer | None:
    if type(module).forward not in _LAYERS:
        return None
    attention, mlp = module.self_attn, module.mlp
    if type(attention).forward not in _ATTENTION or type(mlp).forward is not Qwen2MLP.forward:
        return None
    if type(mlp.act_fn) is not FewRowsSiluAndMul:
        return None
    linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    kernels = [getattr(linear.quant_method, "kernel", None) for linear in linears]
    matrices = [kernel.matrix for kernel in kernels if isinstance(kernel, OneRowLinear)]
    if len(matrices) < len(linears):
        return None
    qkv, output, gate_up, down = matrices
    if gate_up.bias is not None or gate_up.shape[1] % (2 * TILE) or gate_up.shape[1] != 2 * down.shape[0]:
        return None
    heads = _heads(attention)
    if heads is None or qkv.shape[1] != (heads.num_queries + 2 * heads.num_keys) * heads.size:
        return None
    rotary = getattr(attention.rotary_emb, "rotary", attention.rotary_emb)
    cos_sin = getattr(rotary, "cos_sin_cache", None)
    if cos_sin is None or not rotary.is_neox_style or rotary.rotary_dim != heads.size or cos_sin.shape[1] != heads.size:
        return None
    before, between = _norm(module.input_layernorm), _norm(module.post_attention_layernorm)
    if before is None or between is None:
        return None
    cache = caches[attention.attn.layer_name]
    return Layer(before, qkv, heads, cos_sin.to(torch.bfloat16), cache, output, between, gate_up, down)


def _norm(module: Any) -> Norm | None:
    if type(module) is not RMSNorm or not module.has_weight or module.variance_size_override is not None:
        return None
    if module.weight.dtype != torch.bfloat16:
        return None
    return Norm(module.weight.data, module.variance_epsilon)


def _heads(attention: Any) -> Heads | None:
    attn, query_norm, key_norm = attention.attn, None, None
    if attn.sliding_window is not None or attn.head_size != attn.head_size_v or attn.num_heads % attn.num_kv_heads:
        return None
    if attn.head_size < LEAST_SIZE or attn.head_size & (attn.head_size - 1):
        return None
    if type(attention).forward is Qwen3Attention.forward or attention.qk_norm:
        query_norm, key_norm = _norm(attention.q_norm), _norm(attention.k_norm)
        if query_norm is None or key_norm is None or query_norm.eps != key_norm.eps:
            return None
    return Heads(attn.num_heads, attn.num_kv_heads, attn.head_size, attention.scaling, query_norm, key_norm)


def one_token_step(model: VLLMDraftModel) -> OneTokenStep | None:
    """Where a drafter on a GPU has its layers in MXFP4, alone: what its tokens may go through. Every layer is tried
    against vLLM's first. To be called when its cache is bound, and before CUDA graphs are recorded."""
    if model.device.type != "cuda" or model.num_ranks > 1:
        return None
    try:
        layers = decoder_layers(model.model, model.caches)
        if layers is None or not _is_strided(model):
            return None
        decoder = model.model.get_language_model().model
        step = OneTokenStep(layers, decoder.norm, Workspace(model.device))
        differing = _differing(step, decoder.layers, model)
        if differing is not None:
            logger.warning("lvspec: this package's kernels rest, because %s.", differing)
            return None
        _choose_launches(step, model)
        try:
            _choose_head(step, model, reads_e4m3(model.device), lambda run: _seconds(_recorded(run)[0]))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the layers go on
            step.head = None
            logger.warning("lvspec: this package's kernel of a head can't be used: %r", error)
        logger.info_once(
            "lvspec: this package's kernels for a drafted token: programs loop %s, kernels %s, the head is %s.",
            ", ".join(f"{num} x ({name})" for name, num in step.num_loops.items()),
            "overlap" if step.overlaps else "run one after another",
            "vLLM's" if step.head is None else f"in {str(step.head.weight.dtype).removeprefix('torch.')}",
        )
        return step
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model, a device or a compiler can't do: drafts need none of it
        logger.warning("lvspec: this package's kernels of a layer can't be used: %r", error)
        return None


def _choose_launches(step: OneTokenStep, model: VLLMDraftModel) -> None:
    """Whether kernels overlap, and how often programs of products loop as they are launched then."""

    def tune() -> None:
        step.tune(lambda run: _seconds(_recorded(run)[0]))

    step.overlaps = current_platform.is_cuda() and current_platform.has_device_capability(90)
    if step.overlaps:
        try:
            tune()
            step.overlaps = _overlapping_pays(step, model)
            return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a driver that can't record such launches, say
            step.overlaps = False
            logger.warning("lvspec: this package's kernels of a layer can't overlap: %r", error)
    tune()


def _is_strided(model: VLLMDraftModel) -> bool:
    """Whether keys and values lie where the kernel looks for them."""
    name, cache = next(iter(model.caches.items()))
    layer = model.vllm_config.compilation_config.static_forward_context[name]
    if cache.dtype != torch.bfloat16:
        return False
    try:
        return KVLayout(layer, model.group.kv_cache_spec, cache).is_strided
    except UnknownLayoutError:
        return False


@torch.inference_mode()
def _differing(step: OneTokenStep, modules: Iterable[Any], model: VLLMDraftModel) -> str | None:
    """What is not as by vLLM's layers, for a text's next token: what a layer adds, the keys and values that it leaves,
    or the last hidden state. The text is one that the model has read, and each layer is given what those before give:
    of numbers by chance, scores may be so far apart that rounding decides between two of them."""
    num_tokens = min(_TRIAL_TOKENS, model.max_batch_tokens, model.longest_context)
    prompt, batch = model.decode_batch(1, 0, num_tokens), model.decode_batch(1, num_tokens)
    prompt.token_ids = torch.arange(num_tokens, device=model.device) % model.vocab_size
    model.run(prompt, model.metadata(prompt))
    last_wanted = model.run(batch, model.metadata(batch))
    rows = rows_of(batch)
    page, place = divmod(int(batch.slots[0]), model.pool.page_size)
    with model.forward_context(batch, model.metadata(batch)):
        embeds = stream = model.model.embed_input_ids(batch.token_ids)
        for number, (layer, module) in enumerate(zip(step.layers, modules, strict=True)):
            positions = batch.positions[0] if model.takes_one_position(batch) else batch.positions
            added, residual = module(positions, stream.clone(), None)
            wanted, left = added.float() + residual.float(), layer.cache[page, :, place].float()
            layer.cache[page, :, place] = 0
            found = step.layer(layer, stream, rows).float()
            # The sum is rounded: by its largest numbers more than a layer may add to others.
            apart = ((found - wanted).abs() - 2**-7 * wanted.abs()).clamp(min=0)
            errors = {
                "adds something else": _share(apart, wanted - stream.float()),
                "leaves other keys or values": _share(layer.cache[page, :, place].float() - left, left),
            }
            for what, error in errors.items():
                if not error <= _TOLERANCE:  # no number is not, either
                    return f"layer {number} {what} (by {error:.3g} of it)"
            stream = wanted.to(stream.dtype)
        error = _share(step(embeds, rows).float() - last_wanted.float(), last_wanted.float())
    return None if error <= _WHOLE_TOLERANCE else f"the last hidden state is another one (by {error:.3g} of it)"


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """Of sums of magnitudes, in which one number far above all others counts for less than in norms. Nothing is none
    of nothing: layers may add none."""
    return float(part.abs().sum() / whole.abs().sum().clamp(min=1e-30))


def rows_of(batch: DraftBatch) -> Rows:
    """A batch of one token of each request, all dimensions of whose positions are the same."""
    return Rows(batch.positions[0], batch.slots, batch.seq_lens, batch.block_table)


@torch.inference_mode()
def _overlapping_pays(step: OneTokenStep, model: VLLMDraftModel) -> bool:
    """Whether it takes less time, and all bits are what they are else: programs sum in the same order."""
    batch = model.decode_batch(1, min(1024, model.longest_context))
    rows, taken, found = rows_of(batch), [], []
    with model.forward_context(batch, model.metadata(batch)):
        stream = model.model.embed_input_ids(batch.token_ids)
        for step.overlaps in (False, True):
            graph, out = _recorded(lambda: step(stream, rows))
            taken.append(_seconds(graph))
            found.append(out.clone())
    return torch.equal(*found) and taken[1] < taken[0]


def _head(model: VLLMDraftModel) -> Head | None:
    """The model's, where what it does is a product and no more."""
    language_model = model.model.get_language_model()
    head: Any = getattr(language_model, "lm_head", None)
    processor: Any = getattr(language_model, "logits_processor", None)
    if type(processor) is not LogitsProcessor or processor.soft_cap is not None or processor.scale != 1:
        return None
    if processor.logits_as_input or processor.head_dtype not in (None, torch.bfloat16):
        return None
    if type(getattr(head, "quant_method", None)) is not UnquantizedEmbeddingMethod or head.bias is not None:
        return None
    weight = head.weight.data
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous() or _norm(language_model.model.norm) is None:
        return None
    return Head(weight)


@torch.inference_mode()
def _choose_head(
    step: OneTokenStep, model: VLLMDraftModel, has_eight_bits: bool, seconds: Callable[[Callable[[], Any]], float]
) -> None:
    """vLLM's, this package's, or this one in eight bits: whichever takes least, by `seconds`, of those that choose what
    vLLM's does, or what that has hardly less for. One in eight bits is kept beside the one there is, whose weights must
    stay as they are."""
    plain = _head(model)
    if plain is None:
        return
    heads = [plain]
    if has_eight_bits:
        try:
            heads.append(in_eight_bits(plain))
        except torch.OutOfMemoryError:
            logger.warning("lvspec: no memory for the drafter's head in eight bits; it is read in sixteen.")
    step.num_tokens = model.shared_vocab_size
    batch, streams = model.decode_batch(1, min(1024, model.longest_context)), []
    with model.forward_context(batch, model.metadata(batch)):
        for token_id in range(_TRIAL_ENDS):  # that a text may end with
            embeds = model.model.embed_input_ids(torch.full_like(batch.token_ids, token_id))
            streams.append(step.through(embeds, rows_of(batch)))

        def by_vllm(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model.model.compute_logits(step.norm(stream))[:, : step.num_tokens]
            return logits, logits.max(dim=-1).indices

        logits = torch.cat([by_vllm(stream)[0] for stream in streams]).float()
        best, least = None, seconds(functools.partial(by_vllm, streams[0]))
        for step.head in heads:
            kind = str(step.head.weight.dtype).removeprefix("torch.")
            try:
                why = _choosing_otherwise(step, streams, logits)
                if why is not None:
                    logger.warning("lvspec: this package's head in %s rests, because %s.", kind, why)
                elif (taken := seconds(functools.partial(step.choose, streams[0]))) < least:
                    best, least = step.head, taken
            except Exception as error:  # whatever a device or a compiler can't do, or has no memory for
                logger.warning("lvspec: this package's head in %s can't be used: %r", kind, error)
        step.head = best


def _choosing_otherwise(step: OneTokenStep, streams: list[torch.Tensor], logits: torch.Tensor) -> str | None:
    """What the head does that the `logits` of vLLM's, [num_streams, num_tokens], would not."""
    for stream, own in zip(streams, logits, strict=True):
        token_ids, probs = step.choose(stream)
        assert probs is not None
        missing = float((own.max() - own[token_ids]) / own.std())
        apart = float((own.log_softmax(-1)[token_ids] - probs.log()).abs())
        if not (missing <= _HEAD_TOLERANCE and apart <= _LOG_TOLERANCE):  # no number is not, either
            return f"a token that it chooses has {missing:.3g} deviations less, or a probability {apart:.3g} off"
    return None


def _recorded(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of what `run` launches, and what it gives."""
    run()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run()
    finally:
        torch.cuda.set_stream(stream)  # where the capture could not be ended, PyTorch has left its own
    return graph, out


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    """The least of a few times that it takes, without what the host does."""
    taken = []
    for _ in range(4):
        started, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        graph.replay()
        done.record()
        done.synchronize()
        taken.append(started.elapsed_time(done) / 1e3)
    return min(taken)
