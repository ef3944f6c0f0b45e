from setuptools import setup

setup(
    packages=[
        "vllm_lvspec",
        "vllm_lvspec.bench",
        "vllm_lvspec.bench.videofacts",
        "vllm_lvspec.draft",
        "vllm_lvspec.draft.pruning",
        "vllm_lvspec.engine",
        "vllm_lvspec.kernels",
        "vllm_lvspec.observe",
        "vllm_lvspec.reference",
        "vllm_lvspec.verify",
        "vllm_lvspec.verify.policies",
    ],
    # At the top of the repository the folder must not be a package called `kernels`: Hugging Face has one of that
    # name, and transformers looks for it. So it has no `__init__.py` and is installed under this package's name.
    package_dir={"vllm_lvspec.kernels": "kernels"},
    package_data={"vllm_lvspec.observe": ["*.jinja"], "vllm_lvspec.reference": ["checkpoints/*/*/*", "clips/*"]},
)
