"""The folder `kernels` at the top must not be taken for Hugging Face's package of that name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_python_started_in_the_root_finds_our_kernels_under_our_name():
    assert run("import vllm_lvspec.kernels.advance_decode as m; print(m.__name__)") == (
        "vllm_lvspec.kernels.advance_decode"
    )


def test_python_started_in_the_root_does_not_import_our_kernels_as_theirs():
    code = "try:\n import kernels.advance_decode\nexcept ImportError as e: print(e)"
    assert "vllm_lvspec.kernels" in run(code)
    assert run("import kernels; print(getattr(kernels, '__file__', None))") == "None"


def test_transformers_started_in_the_root_does_not_believe_that_kernels_is_installed():
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run(code) == "False"


def test_a_real_package_of_that_name_goes_first(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '9'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.__version__)"
    assert run(code) == "9"
