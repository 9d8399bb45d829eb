#!/usr/bin/env bash
# What `make demo` runs: text of this machine -> tokenizer -> shards -> training on two ranks -> generated text.
# Everything goes under OUTPUT_DIR (runs/demo); what is already there is kept, and training resumes. DATA_DIR may be
# another run's; GATE another gate.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$REPO"
export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$REPO/.venv/bin/python" || command -v python3)}
export OUTPUT_DIR=${OUTPUT_DIR:-runs/demo}
DATA=${DATA_DIR:-$OUTPUT_DIR/data}
if [ "${DRY_RUN:-0}" != 1 ]; then
    mkdir -p "$DATA"
    echo "== 1/5 corpus: this Python's standard library"
    [ -f "$DATA/corpus.jsonl" ] || "$PYTHON" dataset/make_corpus.py --output "$DATA/corpus.jsonl"
    echo "== 2/5 tokenizer: byte-level BPE of 8192 tokens"
    [ -f "$DATA/tokenizer.json" ] ||
        "$PYTHON" tools/train_tokenizer.py --input "$DATA/corpus.jsonl" --vocab-size 8192 --output "$DATA/tokenizer.json"
    echo "== 3/5 shards"
    [ -f "$DATA/corpus_text_document.idx" ] || "$PYTHON" tools/preprocess_data.py --input "$DATA/corpus.jsonl" \
        --output-prefix "$DATA/corpus" --append-eod \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$DATA/tokenizer.json"
fi
export EP_SIZE=${EP_SIZE:-16} GATE=${GATE:-threshold}
echo "== 4/5 training: $EP_SIZE experts, $GATE gate, experts sharded over two ranks"
# Two ranks, unless there is exactly one GPU: a GPU holds one rank.
GPUS_HERE=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
export NUM_GPUS=${NUM_GPUS:-$([ "$GPUS_HERE" = 1 ] && echo 1 || echo 2)} TOKENIZER_TYPE=HuggingFaceTokenizer TOKENIZER_MODEL=$DATA/tokenizer.json
export DATA_PATH=$DATA/corpus_text_document
export NUM_LAYERS=${NUM_LAYERS:-6} HIDDEN_SIZE=${HIDDEN_SIZE:-256} NUM_ATTN_HEADS=${NUM_ATTN_HEADS:-4}
export SEQ_LEN=${SEQ_LEN:-256} INIT_STD=${INIT_STD:-0.06}
export EP_INTERVAL=${EP_INTERVAL:-2} MOE_FFN_HIDDEN_SIZE=${MOE_FFN_HIDDEN_SIZE:-256}
export GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16} BATCH_SIZE=${BATCH_SIZE:-8} TRAIN_ITERS=${TRAIN_ITERS:-200}
export LR=${LR:-2e-3} MIN_LR=${MIN_LR:-2e-4} WARMUP_FRACTION=${WARMUP_FRACTION:-0.1}
export LOG_INTERVAL=${LOG_INTERVAL:-10} EVAL_INTERVAL=${EVAL_INTERVAL:-50} EVAL_ITERS=${EVAL_ITERS:-8}
export SAVE_INTERVAL=${SAVE_INTERVAL:-0}
training=(bash examples_deepspeed/MoE/run.sh --split 95,4,1 --normalization RMSNorm --activation gelu "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then exec "${training[@]}"; fi
"${training[@]}"

echo "== 5/5 five lines from the model"
PATH="$(dirname "$PYTHON"):$PATH" deepspeed --num_gpus "$NUM_GPUS" tools/generate_text.py \
    --load "$OUTPUT_DIR/checkpoints" --max-new-tokens 24 \
    --prompt "def __init__(self" "import " "class " "    return " "    for i in " >"$OUTPUT_DIR/generated.txt" 2>&1 || {
    cat "$OUTPUT_DIR/generated.txt" >&2
    exit 1
}
grep '^>' "$OUTPUT_DIR/generated.txt"
echo "log: $OUTPUT_DIR/log.txt   metrics: $OUTPUT_DIR/metrics.jsonl   TensorBoard: $OUTPUT_DIR/tensorboard"
echo "checkpoint: $OUTPUT_DIR/checkpoints   shards: $DATA"
