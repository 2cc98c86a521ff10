#!/usr/bin/env bash
# A run, or all runs of a pipeline, as one page: findings in words, figures, curves, samples, options
#   bash launch/report.sh OUT        # writes OUT/report.html, and its pictures to OUT/report/
set -euo pipefail
NUM_GPUS=1  # one process, which computes next to nothing

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
needs_options "$@"
choose_device
exec python "$ROOT/launch/lib/alone.py" launch.report.main "$@"
