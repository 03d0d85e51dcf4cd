#!/usr/bin/env bash
# Renews constraints.txt: the newest versions of what the package and its extra "dev" need, for every
# Python that it runs on. Nothing is installed but uv, which finds them.
#
#   tools/constraints.sh [REQUIREMENT ...]    others beside, such as "transformers==5.23.0"
#
# CI tells whether they work together; what passed is committed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -m pip install --quiet uv
new=$(mktemp)
trap 'rm -f "$new"' EXIT

{
  cat << 'HEADER'
# The versions that `make` installs; together they passed CI. The package keeps open lower bounds.
# Renewed by `make constraints` (tools/constraints.sh), not by hand. torch and what belongs to its
# CUDA are not in here: TORCH in the Makefile says which, or they are there already.
nvidia-cuda-runtime<14
nvidia-cuda-crt<14
nvidia-cuda-cccl<14
nvidia-cuda-nvdisasm<14
HEADER
  "$python" -m uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
    --extra dev pyproject.toml <(printf '%s\n' "$@") |
    sed -E '/^(torch|triton|setuptools|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/d'
} > "$new"
cp "$new" constraints.txt
