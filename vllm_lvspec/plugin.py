"""Entry points. vLLM calls `register` in every process, possibly more than once."""


def register() -> None:
    """`vllm.general_plugins`: teach vLLM's arguments the speculative method `lvspec`."""
    from vllm_lvspec.engine.arguments import teach_engine_args

    teach_engine_args()
