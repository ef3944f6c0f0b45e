"""Teach vLLM's `EngineArgs` the speculative method `lvspec`.

vLLM's list of methods is closed, but it has `custom_class`, worker classes by name, and `additional_config` that
travels to all workers. So `lvspec` is put into these words when the engine's configuration is made; the arguments that
the user passed stay as they were. What else this package changes in vLLM is listed in docs/architecture.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.hashing import safe_hash

from vllm_lvspec.config import METHOD, SELF, LVSpecConfig, LVSpecConfigError, names_lvspec
from vllm_lvspec.draft.pairs import default_draft_model
from vllm_lvspec.engine.versions import require_tested_vllm
from vllm_lvspec.verify.sources import AnchorSource

logger = init_logger("vllm.lvspec")

PROPOSER = "vllm_lvspec.engine.proposer.LVSpecProposer"
CPU_WORKER = "vllm_lvspec.engine.cpu.LVSpecCPUWorker"
GPU_WORKER = "vllm_lvspec.engine.worker.LVSpecGPUWorker"
SCHEDULER = "vllm_lvspec.engine.scheduler.LVSpecScheduler"
# Settings by which it is decided whether the target's forward gives an inner layer's states, too.
IN_THE_TARGETS_GRAPH = ("anchor_source", "policy", "pruning")
SHORT_OPTIONS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}


def teach_engine_args() -> None:
    """Wrap the command line's parser and the making of the engine's configuration; a second call does nothing."""
    if getattr(EngineArgs, "_lvspec_taught", False):
        return
    EngineArgs.add_cli_args = staticmethod(_with_lvspec_word(EngineArgs.add_cli_args))
    EngineArgs.create_engine_config = _with_lvspec_translation(EngineArgs.create_engine_config)
    EngineArgs._lvspec_taught = True
    logging.getLogger("vllm.config.scheduler").addFilter(_is_no_false_warning)


def _is_no_false_warning(record: logging.LogRecord) -> bool:
    """vLLM warns that other schedulers cost asynchronous scheduling, which drafters of this kind never have."""
    return not (isinstance(record.args, tuple) and SCHEDULER in record.args)


class AdditionalConfig(UserDict[str, Any]):
    """`additional_config` of an engine with lvspec, by which vLLM decides whether it must compile the target anew.

    Of a plain dictionary vLLM takes every entry into that decision, so that another drafter, policy or K would have the
    same graph compiled again.
    """

    def compute_hash(self) -> str:
        """Of the settings that change the target's graph, and of all that is not this package's."""
        settings = self.data[METHOD]
        gives_more = AnchorSource.parse(settings["anchor_source"]).kind == "layer"
        settings = {key: settings[key] for key in IN_THE_TARGETS_GRAPH} if gives_more else {}
        factors = json.dumps({**self.data, METHOD: settings}, sort_keys=True)
        return safe_hash(factors.encode(), usedforsecurity=False).hexdigest()


def lvspec_settings(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """The settings that `create_engine_config` put into `vllm_config`; None for an engine without lvspec."""
    more = vllm_config.additional_config
    return more.get(METHOD) if isinstance(more, Mapping) else None


def lvspec_config(vllm_config: VllmConfig) -> LVSpecConfig:
    """The settings that `create_engine_config` put into `vllm_config`."""
    return LVSpecConfig(**vllm_config.additional_config[METHOD])


def _with_lvspec_word(add_cli_args: Callable) -> Callable:
    @functools.wraps(add_cli_args)
    def wrapper(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_cli_args(parser)
        for action in parser._actions:
            if "--speculative-config" in action.option_strings:
                assert callable(action.type)
                action.type = _speculative_config_type(action.type)
            if "--spec-method" in action.option_strings and action.choices is not None:
                action.choices = [*action.choices, METHOD]
        return parser

    return wrapper


def _speculative_config_type(parse_json: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = text if names_lvspec(text) else parse_json(text)
        if not names_lvspec(value):
            return value
        try:
            config = LVSpecConfig.parse(value)
        except LVSpecConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return config.model_dump(exclude_unset=True) | {"method": METHOD}

    parse.__name__ = "speculative_config"  # argparse shows it where the text is no JSON
    return parse


def _settings(args: EngineArgs) -> Any:
    """`speculative_config` with `--spec-method`, `--spec-model` and `--spec-tokens` in it, as vLLM means them."""
    short = {key: getattr(args, name) for name, key in SHORT_OPTIONS.items() if getattr(args, name) is not None}
    settings = args.speculative_config
    if not short or not (names_lvspec(settings) or (settings is None and names_lvspec(short))):
        return settings
    settings = LVSpecConfig.parse(settings).model_dump(exclude_unset=True) if settings is not None else {}
    for key in short.keys() & settings.keys():
        raise LVSpecConfigError(f"{key}={settings[key]!r}: given twice, in speculative_config and on its own")
    return {"method": METHOD, **settings, **short}


def _with_lvspec_translation(create_engine_config: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
    @functools.wraps(create_engine_config)
    def wrapper(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        settings = _settings(self)
        if not names_lvspec(settings):
            return create_engine_config(self, *args, **kwargs)
        require_tested_vllm()
        if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
            raise LVSpecConfigError(f"device={current_platform.device_type!r}: lvspec runs on CPUs and on CUDA or ROCm")
        # Only now: in a vLLM that was not tested these imports might fail, in words that help nobody.
        from vllm_lvspec.engine.compatibility import check_arguments, check_engine
        from vllm_lvspec.engine.requests import checker_name, make_tool_calls_strict
        from vllm_lvspec.observe.metrics import record_engines_with_lvspec

        config = LVSpecConfig.parse(settings)
        check_arguments(self)
        if self.worker_cls not in ("auto", CPU_WORKER, GPU_WORKER):
            raise LVSpecConfigError(f"worker_cls={self.worker_cls!r}: lvspec brings its own worker; leave it unset")
        if self.scheduler_cls not in (None, SCHEDULER):
            raise LVSpecConfigError(
                f"scheduler_cls={self.scheduler_cls!r}: lvspec brings its own scheduler; leave it unset"
            )
        if config.model is None:
            config = config.model_copy(update={"model": default_draft_model(self.model) or SELF})
        translated = {
            "speculative_config": {
                "method": "custom_class",
                "model": PROPOSER,
                "num_speculative_tokens": config.num_speculative_tokens,
            },
            "additional_config": AdditionalConfig(
                {**self.additional_config, METHOD: json.loads(config.model_dump_json())}
            ),
            **dict.fromkeys(SHORT_OPTIONS),
            "logits_processors": [checker_name(config)],
            "worker_cls": CPU_WORKER if current_platform.is_cpu() else GPU_WORKER,
            "scheduler_cls": SCHEDULER,
        }
        original = {name: getattr(self, name) for name in translated}
        try:
            for name, value in translated.items():
                setattr(self, name, value)
            vllm_config = create_engine_config(self, *args, **kwargs)
        finally:
            for name, value in original.items():
                setattr(self, name, value)
        config = check_engine(vllm_config, config)
        vllm_config.additional_config[METHOD] = json.loads(config.model_dump_json())
        make_tool_calls_strict()
        record_engines_with_lvspec()
        logger.info(
            "lvspec: %s drafts %d tokens a step for %s (pruning=%s, pruning_ratio=%g); policy=%s%s",
            config.model,
            config.num_speculative_tokens,
            vllm_config.model_config.model,
            config.pruning,
            config.pruning_ratio,
            config.policy,
            "." if config.policy != "strict" else ": outputs are those of the target alone.",
        )
        if config.is_lossy:
            logger.warning(
                "lvspec: policy=%s is lossy: answers may differ from what the model alone would say, and a fact may be "
                "lost now and then; policy=strict loses nothing, and a request can ask for it "
                '(vllm_xargs={"lvspec_policy": "strict"}).',
                config.policy,
            )
        return vllm_config

    return wrapper
