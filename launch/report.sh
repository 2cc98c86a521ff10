#!/usr/bin/env bash
# Report on all runs in a folder, as one page: findings with advice, metrics, curves, samples, options
#   bash launch/report.sh OUT        # writes OUT/report.html, and its pictures to OUT/report/
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
NUM_GPUS=1 # one process, on the CPU
install requirements.txt
[ $# -gt 0 ] || { echo "error: options are required: bash launch/report.sh OUT (--help lists all)" >&2 && exit 2; }
choose_device
exec python "$HERE/lib/alone.py" launch.report.main "$@"
