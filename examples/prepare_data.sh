#!/usr/bin/env bash
# Text to increments: three from this Python's standard library, or from a folder of dated JSON lines: the parts it is
# already cut into (NAME.train.jsonl, NAME.val.jsonl), else PARTS (3) of equal size in the order of their dates.
#   examples/prepare_data.sh DIR [CORPUS]     leaves DIR/NAME.{train,valid}_text_document.{bin,idx,json}
# Each tool says "up to date" and stops where its output is already there.
set -euo pipefail
cd "$(dirname "$0")/.."
DIR=$1
CORPUS=${2:-}
VOCAB_SIZE=${VOCAB_SIZE:-2048}

if [[ -n "$CORPUS" ]] && compgen -G "$CORPUS/*.train.jsonl*" > /dev/null; then
    python tools/split_increments.py --input "$CORPUS" --output "$DIR/text"
elif [[ -n "$CORPUS" ]]; then
    python tools/split_increments.py --input "$CORPUS" --output "$DIR/text" --parts "${PARTS:-3}"
else
    python tools/make_corpus.py --output "$DIR/text"
fi

mapfile -t NAMES < <(python examples/increment_names.py "$DIR/text")

# The tokenizer is trained on the first increment alone: later text must not leak into the first version.
python tools/train_tokenizer.py --input "$DIR/text/${NAMES[0]}.train.jsonl" --vocab-size "$VOCAB_SIZE" \
    --output "$DIR/tokenizer.model"

for NAME in "${NAMES[@]}"; do
    for PART in train valid; do
        python tools/preprocess_data.py --input "$DIR/text/$NAME.$PART.jsonl" --output-prefix "$DIR/$NAME.$PART" \
            --name "$NAME" --append-eod --workers 1 \
            --tokenizer-type SentencePieceTokenizer --tokenizer-model "$DIR/tokenizer.model"
    done
done
