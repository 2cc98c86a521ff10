#!/usr/bin/env bash
# Lint and the whole test suite, or the fast part of it
#   bash launch/test.sh [--fast]                                      # and options of pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt tests/requirements.txt common/model/requirements-qlora.txt
choose_device
cd "$ROOT"
# As root, get what the test of HOSTFILE needs; it is skipped without.
[[ $EUID -ne 0 ]] || command -v pdsh >/dev/null || timeout 60 apt-get install -qq -y pdsh &>/dev/null || true
ruff check .
ruff format --check .
case "${1:-}" in
--fast) set -- -m "not end_to_end" "${@:2}" ;;
esac
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal "$@"
