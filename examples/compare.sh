#!/usr/bin/env bash
# The same increments by three paradigms: from scratch, continual, path switching. Perplexities beside costs.
#   examples/compare.sh        takes CORPUS, RUN and TRAIN_ARGS as examples/quickstart.sh does
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/places.sh runs/compare
PARADIGMS=(ptfs cpt lrps)

examples/prepare_data.sh "$DATA" "$CORPUS"
for PARADIGM in "${PARADIGMS[@]}"; do
    examples/train_small.sh "$DATA" "$RUN/$PARADIGM" --paradigm "$PARADIGM" "${FLAGS[@]}"
done
python tools/report.py --compare "${PARADIGMS[@]/#/$RUN/}" --output "$RUN/report.html"
