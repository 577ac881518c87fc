#!/usr/bin/env bash
# Pretrain a LLaMA by learning rate path switching on one GPU, one node or several: a launch script in the manner of
# Megatron-LM's. Model, plan and optimizer are examples/$MODEL.yaml, whose head names layouts and the memory they take.
#
#   examples/pretrain.sh RUN TENSORBOARD TOKENIZER INCREMENT [INCREMENT ...]
#
#   RUN          run directory; a run found there goes on, so the same command continues it
#   TENSORBOARD  directory of TensorBoard's files, or none (the package is in the extra "tracking")
#   TOKENIZER    SentencePiece model that the increments were made with
#   INCREMENT    prefix of an indexed dataset, oldest first; a version is released for each
#
# From the environment, each with what one GPU takes:
#   MODEL           llama_203m (default), llama_1.2b or llama_3.1b
#   GPUS_PER_NODE   1
#   LAYOUT          "--flag value ...": how a model is cut over ranks, none: every rank holds the whole
#   HELD_OUT        "PREFIX ...": held-out part of each increment, in the same order
#   TRAIN_ARGS      "--flag value ...": further flags; said last, so they win over all others
# Several nodes: the same command on each, RUN on a file system that all of them share. They find each other either by
#   NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    ranks stand in the order of NODE_RANK; when a node is lost, every
#                                                     launch ends, a silent one after --distributed-timeout-minutes
# or, where torchrun itself is to start again after a crash, by its rendezvous
#   NUM_NODES, RDZV_ENDPOINT=HOST:PORT, MAX_RESTARTS  ranks stand in the order of the nodes' names, as text; when the
#                                                     HOST falls silent, the other launchers wait on: end them by hand
# Over gloo, and where a node's name leads to 127.0.1.1, also GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME): docs/parallel.md.
#
#   MODEL=llama_1.2b GPUS_PER_NODE=8 LAYOUT="--tensor-model-parallel-size 2 --sequence-parallel" \
#       examples/pretrain.sh runs/1.2b none tokenizer.model data/2022 data/2023 data/2024
#
# Long sequences, cut over ranks with all that is computed of them (docs/parallel.md, Context parallel):
#
#   MODEL=llama_3.1b GPUS_PER_NODE=8 NUM_NODES=4 NODE_RANK=... MASTER_ADDR=... \
#   LAYOUT="--tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 8" \
#   TRAIN_ARGS="--seq-length 131072 --global-batch-size 8 --rotary-base 500000" \
#       examples/pretrain.sh runs/long none tokenizer.model data/2022 data/2023 data/2024
set -euo pipefail
if (($# < 4)); then
    echo "usage: $0 RUN TENSORBOARD TOKENIZER INCREMENT [INCREMENT ...]" >&2
    exit 2
fi
RUN=$1 TENSORBOARD=$2 TOKENIZER=$3
shift 3
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CONFIG=$ROOT/examples/${MODEL:-llama_203m}.yaml
if [[ ! -f "$CONFIG" ]]; then
    echo "$0: MODEL=$MODEL: there is no $CONFIG" >&2
    exit 2
fi
read -r -a LAYOUT_ARGS <<< "${LAYOUT:-}"
read -r -a HELD_OUT_PREFIXES <<< "${HELD_OUT:-}"
read -r -a LAST_ARGS <<< "${TRAIN_ARGS:-}"

DISTRIBUTED_ARGS=(
    --nproc-per-node "${GPUS_PER_NODE:-1}"
    --nnodes "${NUM_NODES:-1}"
)
if [[ -n "${RDZV_ENDPOINT:-}" ]]; then
    DISTRIBUTED_ARGS+=(
        --rdzv-backend c10d
        --rdzv-endpoint "$RDZV_ENDPOINT"
        --rdzv-id "$(basename "$RUN")"
        --max-restarts "${MAX_RESTARTS:-0}"
    )
    # Else workers that are started again find the addresses of their first start (pytorch#135712).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
else
    DISTRIBUTED_ARGS+=(
        --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-localhost}"
        --master-port "${MASTER_PORT:-6000}"
    )
fi

DATA_ARGS=(
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "$TOKENIZER"
    --increments "$@"
)
if ((${#HELD_OUT_PREFIXES[@]})); then
    DATA_ARGS+=(--valid-data-path "${HELD_OUT_PREFIXES[@]}")
fi

SAVE_AND_LOGGING_ARGS=(--save "$RUN")
if [[ "$TENSORBOARD" != none ]]; then
    SAVE_AND_LOGGING_ARGS+=(--tensorboard-dir "$TENSORBOARD")
fi

exec torchrun "${DISTRIBUTED_ARGS[@]}" "$ROOT/pretrain_gpt.py" \
    --config "$CONFIG" \
    "${LAYOUT_ARGS[@]}" \
    "${DATA_ARGS[@]}" \
    "${SAVE_AND_LOGGING_ARGS[@]}" \
    "${LAST_ARGS[@]}"
