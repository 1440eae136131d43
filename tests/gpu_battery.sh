#!/usr/bin/env bash
# Whether train_gpt.py works on this machine's GPU, and how fast: one call, at most eight minutes, no network.
#
#   tests/gpu_battery.sh OUT              its parts, the most valuable first; OUT gets summary.txt and log.txt as they come
#   tests/gpu_battery.sh OUT step chain   these parts alone; also audit, variants, frontier, qat, reductions: minutes each
#   tests/gpu_battery.sh --cpu OUT        the same parts, tiny, on CPU: a dry run of the battery itself
#
# Text: that of the folder REAL_TEXT_DIR (data/README.md, "Measurement data"), else the Python installation's own.
# Exit code: 0 if no part failed, else 1. PYTHON names an interpreter with torch; else .venv's, else python3.
set -euo pipefail
here="$(dirname "$0")"
python="${PYTHON:-$here/../.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" PYTHONUNBUFFERED=1
exec "$python" "$here/gpu_battery.py" "$@"
