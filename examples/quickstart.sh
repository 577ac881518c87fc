#!/usr/bin/env bash
# Three version updates of a small LLaMA by learning rate path switching, on real text, on a CPU.
#   examples/quickstart.sh                     text of this Python's standard library
#   CORPUS=DIR examples/quickstart.sh          a folder of dated JSON lines instead, in PARTS (3) by date
#   TRAIN_ARGS="--lr 1e-3" RUN=runs/mine ...   other options, another run directory
# Killed or finished, it goes on from what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/places.sh runs/quickstart

examples/prepare_data.sh "$DATA" "$CORPUS"
examples/train_small.sh "$DATA" "$RUN" "${FLAGS[@]}"
python tools/report.py --run "$RUN"
