# Where a small run finds its text and puts its results. Sourced, with the run directory it would like:
#   source examples/places.sh runs/quickstart      reads CORPUS, PARTS, DATA, RUN, TRAIN_ARGS; sets CORPUS, DATA, RUN, FLAGS
# shellcheck shell=bash
CORPUS=${CORPUS:-}
TEXT=$(basename "${CORPUS:-standard_library}")
DATA=${DATA:-runs/data/$TEXT${PARTS:+-$PARTS}}
if [[ -z "${RUN:-}" ]]; then
    RUN=$1
    # A run goes on with its own text only: where the place is taken by a run on other text, stand beside it.
    if grep -qs . "$RUN/config.yaml" "$RUN"/*/config.yaml && ! grep -qsF -- "- $DATA/" "$RUN/config.yaml" "$RUN"/*/config.yaml; then
        RUN=$1-$TEXT
    fi
fi
read -r -a FLAGS <<< "${TRAIN_ARGS:-}"
