#!/usr/bin/env bash
# Lint and all tests.
#   bash launch/test.sh
set -euo pipefail
NUM_GPUS="${NUM_GPUS:-1}"

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt tests/requirements.txt
choose_device
cd "$ROOT"
ruff check .
ruff format --check .
OMP_NUM_THREADS=1 python -m pytest -n 2 "$@"
