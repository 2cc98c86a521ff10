#!/usr/bin/env bash
# Report on all runs in a folder, as one page: findings with advice, metrics, curves, samples, options
#   bash launch/report.sh OUT        # writes OUT/report.html, and its pictures to OUT/report/
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
NUM_GPUS=1 # one process, on the CPU
install requirements.txt
needs_options "$@"
choose_device
exec python "$HERE/lib/alone.py" launch.report.main "$@"
