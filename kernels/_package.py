"""Refuse to be imported as the top-level package `kernels`, which belongs to Hugging Face."""

if __name__ != "vllm_lvspec.kernels._package":
    raise ImportError("this folder is the package vllm_lvspec.kernels; import it under that name")
