"""Ray Serve: replicas of a Video-LLM that drafts, behind one OpenAI API.

    serve run serve_app:app model=Qwen/Qwen2.5-VL-32B-Instruct tensor_parallel_size=2 max_replicas=4

or, with everything that `Settings` has, from a file: `serve deploy app.yaml`.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app


class Settings(BaseModel):
    """What the app is built from. Values that come from a command line are texts, so JSON is read where it is asked."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="the target: a folder that every node has, or a name of the hub")
    name: str | None = Field(None, description="what clients call it; by default the model's own name")
    speculative_config: str = Field("lvspec", description="the word, lvspec:DRAFTER, or the settings as JSON")
    tensor_parallel_size: int = Field(1, ge=1, description="devices of a replica")
    min_replicas: int = Field(1, ge=0, description="that are always there")
    max_replicas: int = Field(1, ge=1, description="where there is load for them")
    target_ongoing_requests: int = Field(8, ge=1, description="of a replica, above which another one is started")
    cpus_per_replica: int | None = Field(None, ge=1, description="on CPUs: reserved for a replica; unset on GPUs")
    engine: dict[str, Any] | str = Field({}, description="more arguments of vLLM's engine")
    environment: dict[str, str] | str = Field({}, description="variables of the replicas")


def llm_config(settings: Settings) -> LLMConfig:
    """One model of the app."""
    speculative: Any = settings.speculative_config
    if speculative.lstrip().startswith("{"):
        speculative = json.loads(speculative)
    return LLMConfig(
        model_loading_config={"model_id": settings.name or settings.model, "model_source": settings.model},
        engine_kwargs={
            "tensor_parallel_size": settings.tensor_parallel_size,
            "speculative_config": speculative,
            **_mapping(settings.engine),
        },
        deployment_config={
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing_requests,
            },
        },
        runtime_env={"env_vars": _mapping(settings.environment)},
        placement_group_config=None
        if settings.cpus_per_replica is None
        else {"bundles": [{"CPU": settings.cpus_per_replica}], "strategy": "PACK"},
    )


def app(settings: Settings) -> Application:
    """What `serve run` builds."""
    return build_openai_app({"llm_configs": [llm_config(settings)]})


def _mapping(value: dict[str, Any] | str) -> dict[str, Any]:
    return json.loads(value) if isinstance(value, str) else value
