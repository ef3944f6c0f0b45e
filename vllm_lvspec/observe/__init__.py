"""What can be seen of the plugin from outside: vLLM's `/metrics`, and routes under `/v1/lvspec`."""
