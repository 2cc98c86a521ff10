#!/usr/bin/env bash
# Report on all runs in a folder, as one page: findings with advice, metrics, curves, samples, options
#   bash launch/report.sh OUT        # writes OUT/report.html, and its pictures to OUT/report/
set -euo pipefail
NUM_GPUS=1  # one process, on the CPU

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
needs_options "$@"
choose_device
exec python "$ROOT/launch/lib/alone.py" launch.report.main "$@"
