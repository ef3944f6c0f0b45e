"""Entry points. vLLM calls `register` in every process, possibly more than once."""


def register() -> None:
    """`vllm.general_plugins`: teach vLLM the speculative method `lvspec` and the load format `lvspec_upscale`."""
    from vllm_lvspec.engine.arguments import teach_engine_args
    from vllm_lvspec.engine.versions import is_tested_vllm

    teach_engine_args()
    if is_tested_vllm():
        import vllm_lvspec.engine.upscale  # noqa: F401
