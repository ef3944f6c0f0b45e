"""The proposer that vLLM builds for `custom_class`: turns the runner's batch into the drafter's requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.mem_constants import GiB_bytes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_lvspec.draft.drafter import Drafter, DraftRequest, VisualItem
from vllm_lvspec.draft.pruning import STRATEGIES, VisualGrid
from vllm_lvspec.engine.arguments import lvspec_config
from vllm_lvspec.engine.draft_model import PromptView, VLLMDraftModel

logger = init_logger("vllm.lvspec")

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class LVSpecProposer:
    """Drafts with a second Video-LLM that sees a pruned video."""

    def __init__(self, vllm_config: VllmConfig):
        self.vllm_config = vllm_config
        self.config = lvspec_config(vllm_config)
        self.drafter: Drafter | None = None
        self._step: tuple[SchedulerOutput, Sequence[str], Mapping[str, CachedRequestState]] | None = None
        self._items: dict[str, tuple[int, list[VisualItem]]] = {}

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Build the drafter and its cache; called before vLLM sizes its own cache."""
        device = next(target_model.parameters()).device
        model = VLLMDraftModel(self.vllm_config, self.config, device)
        weights = sum(p.nbytes for p in model.model.parameters())
        logger.info_once(
            "lvspec: drafter loaded: %.3f GiB of weights, KV cache of %.3f GiB = %d tokens, visual embeddings up to "
            "%.2f GiB (per rank).",
            weights / GiB_bytes,
            model.cache_bytes / GiB_bytes,
            model.pool.num_pages * model.pool.page_size,
            self.config.embedding_cache_gib,
        )
        self.drafter = Drafter(
            model,
            STRATEGIES[self.config.pruning],
            self.config.pruning_ratio,
            int(self.config.embedding_cache_gib * GiB_bytes),
        )

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Hold the room that visual embeddings will take while vLLM profiles its memory."""
        assert self.drafter is not None
        device = self.drafter.model.device
        room = None
        if device.type == "cuda":
            room = torch.empty(self.drafter.embeddings.max_bytes, dtype=torch.uint8, device=device)
        yield
        del room

    def profile(self) -> None:
        """Run the largest forward of the drafter once."""
        assert self.drafter is not None
        self.drafter.model.profile()

    def release(self, req_id: str) -> None:
        """Forget a request that has finished, was aborted or preempted."""
        self._items.pop(req_id, None)
        if self.drafter is not None:
            self.drafter.release(req_id)

    def begin_step(
        self, scheduler_output: SchedulerOutput, req_ids: Sequence[str], requests: Mapping[str, CachedRequestState]
    ) -> None:
        """What `propose`, whose arguments vLLM fixes, needs to know of this step."""
        self._step = (scheduler_output, req_ids, requests)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafted tokens per request of the batch; empty for requests that are still being prefilled."""
        assert self.drafter is not None and self._step is not None
        scheduler_output, req_ids, states = self._step
        self._step = None
        indices, batch = [], []
        for i, (req_id, sampled) in enumerate(zip(req_ids, sampled_token_ids, strict=False)):
            if not sampled:
                continue
            state = states[req_id]
            token_ids = token_ids_cpu[i, : num_tokens_no_spec[i]]
            indices.append(i)
            batch.append(self._request(state, token_ids))
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        for i, draft in zip(
            indices, self.drafter.propose(batch, scheduler_output.num_spec_tokens_to_schedule), strict=True
        ):
            drafts[i] = draft
        return drafts

    def _request(self, state: CachedRequestState, token_ids: np.ndarray) -> DraftRequest:
        assert state.prompt_token_ids is not None and state.sampling_params is not None
        num_prompt_tokens = len(state.prompt_token_ids)
        known = self._items.get(state.req_id)
        if known is None or known[0] != num_prompt_tokens:
            known = (num_prompt_tokens, [visual_item(f) for f in state.mm_features])
            self._items[state.req_id] = known
        max_tokens = state.sampling_params.max_tokens or self.vllm_config.model_config.max_model_len
        left = min(
            max_tokens - (len(token_ids) - num_prompt_tokens),
            self.vllm_config.model_config.max_model_len - len(token_ids),
        )
        return DraftRequest(
            req_id=state.req_id,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens,
            items=known[1],
            prompt=PromptView(state.prompt_token_ids, state.mm_features),
            max_draft_tokens=left - 1,  # the last one is the target's
        )

    def stats(self) -> dict[str, int]:
        """Counts since the start, and what the caches hold."""
        assert self.drafter is not None
        pool = self.drafter.model.pool
        return {
            **self.drafter.counts,
            "pages_total": pool.num_pages,
            "pages_free": pool.num_free,
            "sequences": len(self.drafter.sequences),
            "embedding_items": len(self.drafter.embeddings),
            "embedding_bytes": self.drafter.embeddings.num_bytes,
        }


def embedded_rows(feature: MultiModalFeatureSpec) -> np.ndarray:
    """Indices among the prompt's tokens that the item's embeddings replace, ascending, int64 `[num_embeddings]`."""
    place = feature.mm_position
    rows = np.arange(place.length)
    if place.is_embed is not None:
        rows = np.flatnonzero(place.is_embed.numpy())
    return rows + place.offset


def visual_item(feature: MultiModalFeatureSpec) -> VisualItem:
    """The drafter's view of one of vLLM's multimodal features."""
    rows = embedded_rows(feature)
    has_pixels = feature.data is not None and PIXELS.get(feature.modality) in feature.data
    return VisualItem(
        identifier=feature.identifier,
        is_video=feature.modality == "video",
        grid=_grid(feature, len(rows)),
        rows=rows,
        payload=feature if has_pixels else None,
    )


def _grid(feature: MultiModalFeatureSpec, num_tokens: int) -> VisualGrid:
    """Time, height and width of a video's tokens, from what the processor made of it.

    Qwen-VL says its patch grid, of which the model merges squares; LLaVA-OneVision pools every frame to a square and
    adds one line-end token to the video. Anything else is taken as a row of tokens.
    """
    data = feature.data or {}
    if (element := data.get("video_grid_thw")) is not None:
        time, height, width = (int(x) for x in element.data)
        merge = int((time * height * width / num_tokens) ** 0.5 + 0.5)
        if time * (height // merge) * (width // merge) == num_tokens:
            return VisualGrid(time, height // merge, width // merge)
    if (element := data.get("pixel_values_videos")) is not None and element.data is not None and element.data.ndim == 4:
        frames = len(element.data)
        side = int(((num_tokens - 1) / frames) ** 0.5)
        if frames * side * side + 1 == num_tokens:
            return VisualGrid(frames, side, side, num_extra=1)
    return VisualGrid(1, 1, num_tokens)
