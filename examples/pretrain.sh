#!/usr/bin/env bash
# Pretrain a LLaMA of 203M parameters by learning rate path switching, on one node or several: a launch script in the
# manner of Megatron-LM's. Every rank holds the whole model; other layouts: docs/parallel.md.
#
#   examples/pretrain.sh RUN TENSORBOARD TOKENIZER INCREMENT [INCREMENT ...]
#
#   RUN          run directory; a run found there goes on, so the same command continues it
#   TENSORBOARD  directory of TensorBoard's files, or none (the package is in the extra "tracking")
#   TOKENIZER    SentencePiece model that the increments were made with
#   INCREMENT    prefix of an indexed dataset, oldest first; a version is released for each
#
# From the environment, as torchrun needs them on each node:
#   GPUS_PER_NODE NUM_NODES NODE_RANK MASTER_ADDR MASTER_PORT
# and, where wanted:
#   HELD_OUT     "PREFIX ...": held-out part of each increment, in the same order
#   TRAIN_ARGS   "--flag value ...": further flags; said last, so they win over those below
set -euo pipefail
if (($# < 4)); then
    echo "usage: $0 RUN TENSORBOARD TOKENIZER INCREMENT [INCREMENT ...]" >&2
    exit 2
fi
RUN=$1 TENSORBOARD=$2 TOKENIZER=$3
shift 3
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -r -a HELD_OUT_PREFIXES <<< "${HELD_OUT:-}"
read -r -a LAST_ARGS <<< "${TRAIN_ARGS:-}"

DISTRIBUTED_ARGS=(
    --nproc-per-node "${GPUS_PER_NODE:-1}"
    --nnodes "${NUM_NODES:-1}"
    --node-rank "${NODE_RANK:-0}"
    --master-addr "${MASTER_ADDR:-localhost}"
    --master-port "${MASTER_PORT:-6000}"
)

MODEL_ARGS=(
    --num-layers 15
    --hidden-size 896
    --num-attention-heads 14
    --ffn-hidden-size 2432
    --untie-embeddings-and-output-weights
)

PLAN_ARGS=(
    --paradigm lrps
    --alpha 0.6
    --lr 3.0e-4
    --min-lr 3.0e-5
    --lr-decay-style cosine
)

TRAINING_ARGS=(
    --seq-length 2048
    --global-batch-size 512    # 2^20 tokens a step
    --micro-batch-size 8       # 14.74 GiB a rank with a vocabulary of 32,000: a GPU of 24 GB
    --bf16
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --clip-grad 1.0
)

DATA_ARGS=(
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
    --increments "$@"
)
if ((${#HELD_OUT_PREFIXES[@]})); then
    DATA_ARGS+=(--valid-data-path "${HELD_OUT_PREFIXES[@]}")
fi

CHECKPOINT_AND_LOGGING_ARGS=(
    --save "$RUN"
    --save-interval 500
    --log-interval 10
)
if [[ "$TENSORBOARD" != none ]]; then
    CHECKPOINT_AND_LOGGING_ARGS+=(--tensorboard-dir "$TENSORBOARD")
fi

exec torchrun "${DISTRIBUTED_ARGS[@]}" "$ROOT/pretrain_gpt.py" \
    "${MODEL_ARGS[@]}" \
    "${PLAN_ARGS[@]}" \
    "${TRAINING_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${CHECKPOINT_AND_LOGGING_ARGS[@]}" \
    "${LAST_ARGS[@]}"
