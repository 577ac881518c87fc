#!/usr/bin/env bash
# Train one paradigm on the increments of a data directory.   examples/train_small.sh DATA RUN [FLAG ...]
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=$1 RUN=$2
shift 2
RANKS=${RANKS:-2}    # two data-parallel processes of one thread each: faster than one process of two for a small model

mapfile -t NAMES < <(python examples/increment_names.py "$DATA/text")
INCREMENTS=("${NAMES[@]/%/.train_text_document}")
HELD_OUT=("${NAMES[@]/%/.valid_text_document}")

ARGUMENTS=(
    --config examples/quickstart.yaml
    --increments "${INCREMENTS[@]/#/$DATA/}"
    --valid-data-path "${HELD_OUT[@]/#/$DATA/}"
    --tokenizer-model "$DATA/tokenizer.model"
    --save "$RUN" "$@"
)
# A mistake is told in one line here; under torchrun a page of its own would follow it.
WORLD_SIZE=$RANKS python pretrain_gpt.py "${ARGUMENTS[@]}" --dry-run > /dev/null
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} torchrun --standalone --nproc-per-node "$RANKS" pretrain_gpt.py "${ARGUMENTS[@]}"
