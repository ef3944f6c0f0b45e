"""vLLM's loader for a small checkpoint in a larger model's shape (`vllm_lvspec.reference.upscale`)."""

from __future__ import annotations

from collections.abc import Generator

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.config.utils import replace
from vllm.logger import init_logger
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config

from vllm_lvspec.reference.upscale import LOAD_FORMAT, check_served, text_shape, upscale

logger = init_logger("vllm.lvspec")


@register_model_loader(LOAD_FORMAT)
class UpscalingModelLoader(DefaultModelLoader):
    """Upscales each weight as it is read; vLLM then renames, fuses and shards it as if it had been read so."""

    def __init__(self, load_config: LoadConfig):
        super().__init__(replace(load_config, load_format="auto"))

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        weights = super().get_all_weights(model_config, model)
        if not model_config.hf_overrides:  # a drafter, which vLLM loads in the target's format
            logger.info("%s: no hf_overrides, so it is loaded in its own shape.", model_config.model)
            yield from weights
            return
        saved = get_config(
            model_config.model, model_config.trust_remote_code, model_config.revision, model_config.code_revision
        )
        check_served(saved, model_config.hf_config)
        # On the device: most of what is loaded are zeros, which need not travel there.
        weights = ((name, weight.to(current_platform.device_type)) for name, weight in weights)
        yield from upscale(weights, saved, text_shape(model_config.hf_config))
