"""Routes under `/v1/lvspec`: what the plugin has done, and why a request's tokens are what they are.

vLLM loads endpoint plugins only where `VLLM_PLUGINS` names them, and its API keys guard what is under `/v1`.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from vllm.tokenizers.detokenizer_utils import detokenize_incrementally
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_lvspec.config import METHOD
from vllm_lvspec.engine.arguments import lvspec_settings

router = APIRouter(prefix=f"/v1/{METHOD}", tags=[METHOD])
ERRORS: dict[int | str, dict[str, Any]] = {
    HTTPStatus.UNAUTHORIZED.value: {"description": "not the server's key"},
    HTTPStatus.NOT_FOUND.value: {"description": "the server does not use lvspec, or keeps no such trace"},
}


class LVSpecEndpoint:
    """`vllm.endpoint_plugins`: one per API server."""

    name = METHOD
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: AsyncLLM | None, state: State, args: Namespace) -> None:
        has_lvspec = engine_client is not None and lvspec_settings(engine_client.vllm_config) is not None
        state.lvspec_engine = engine_client if has_lvspec else None


def _responses(**parts: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What a route may answer; `parts`: what there is beside the model's name and the plugin's settings."""
    properties = {"model": {"type": "string"}, "settings": {"type": "object"}, **parts}
    schema = {"type": "object", "required": list(properties), "properties": properties}
    content = {"application/json": {"schema": schema}}
    return {HTTPStatus.OK.value: {"description": "found", "content": content}, **ERRORS}


def _error(message: str) -> JSONResponse:
    """As vLLM's own errors are written."""
    status = HTTPStatus.NOT_FOUND.value
    return JSONResponse({"error": {"message": message, "type": "NotFoundError", "param": None, "code": status}}, status)


def _no_lvspec() -> JSONResponse:
    return _error("this server decodes without lvspec: start it with --speculative-config lvspec")


@router.get("/stats", responses=_responses(ranks={"type": "array", "items": {"type": "object"}, "minItems": 1}))
async def stats(request: Request) -> JSONResponse:
    """The plugin's settings, and what each rank of each engine has counted since the start."""
    engine: AsyncLLM | None = request.app.state.lvspec_engine
    if engine is None:
        return _no_lvspec()
    found = await _ask(engine, "lvspec_stats")
    ranks = [{"engine": index, **counts} for index, ranks in found.items() for counts in ranks]
    return JSONResponse({"model": _model(engine), "settings": lvspec_settings(engine.vllm_config), "ranks": ranks})


@router.get(  # clients may name requests as they like
    "/trace/{request_id:path}",
    responses=_responses(choices={"type": "array", "items": {"type": "object"}, "minItems": 1}),
)
async def trace(request: Request, request_id: str) -> JSONResponse:
    """Every token of a request that runs or is among the last that have finished, and why it was emitted."""
    engine: AsyncLLM | None = request.app.state.lvspec_engine
    if engine is None:
        return _no_lvspec()
    settings = lvspec_settings(engine.vllm_config)
    if settings is None or not settings["trace"]:
        return _error('this server keeps no traces: set "trace" in --speculative-config to how many it may keep')
    found = await _ask(engine, "lvspec_trace", request_id)
    choices = next((first for first, *_ in found.values() if first), None)
    if choices is None:
        return _error(
            f"request_id={request_id!r}: not among the requests that run and the last {settings['trace']} finished ones"
        )
    for choice in choices:
        await asyncio.to_thread(add_texts, choice, engine.renderer.get_tokenizer())
    return JSONResponse({"model": _model(engine), "settings": settings, "choices": choices})


async def _ask(engine: AsyncLLM, method: str, *args: Any) -> dict[int, list[Any]]:
    """What the ranks of each data-parallel engine say that this server sends requests to, by the engines' numbers.

    vLLM's `collective_rpc` asks all engines, too, and gives the first one's answers.
    """
    core = engine.engine_core
    found = await core.call_utility_all_async("collective_rpc", method, None, args, None)
    return dict(zip(core.engine_ranks_managed, found, strict=True))


def _model(engine: AsyncLLM) -> str:
    return str(engine.vllm_config.model_config.served_model_name)


def add_texts(trace: dict[str, Any], tokenizer: Any) -> None:
    """Write beside the ids in a `RequestTrace` what they say: `text`, `target_text`, `draft_text`.

    A token's text is what it adds to the answer: characters may take several tokens, and the last one has them.
    """
    ids: list[int] = []
    pieces: list[str] | None = None
    prefix = read = 0
    for token in trace["tokens"]:
        ids.append(token["token_id"])
        new, token["text"], prefix, read = detokenize_incrementally(tokenizer, ids, pieces, prefix, read)
        if pieces is None:
            pieces = []
        pieces.extend(new)
        for name in ("target", "draft"):
            known = token[f"{name}_id"]
            token[f"{name}_text"] = None if known is None or known < 0 else tokenizer.decode([known])
