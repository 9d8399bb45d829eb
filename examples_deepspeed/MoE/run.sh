#!/usr/bin/env bash
# Trains a mixture-of-experts GPT. Every value is a variable, so nothing here needs editing:
#   EP_SIZE=64 TOPK=8 THRESHOLD=0.9 DATA_PATH=data/owt_text_document bash examples_deepspeed/MoE/run.sh
# The defaults are XMoE's reference recipe, but dropless (MOE_DROP_TOKEN=true gives its capacity 8). The same NAME (or OUTPUT_DIR) resumes. DRY_RUN=1 prints the command and the
# model's size. More flags of pretrain_gpt.py may follow the script's name. Exit status: the run's.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-$([ -x "$REPO/.venv/bin/python" ] && echo "$REPO/.venv/bin/python" || command -v python3)}
export PATH="$(dirname "$PYTHON"):$PATH"

# Machines. NUM_GPUS is ranks per node; without CUDA they are CPU processes.
GPUS_HERE=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
NUM_GPUS=${NUM_GPUS:-$((GPUS_HERE > 0 ? GPUS_HERE : 1))}
NUM_NODES=${NUM_NODES:-1}
HOSTFILE=${HOSTFILE:-}
MASTER_ADDR=${MASTER_ADDR:-}
MASTER_PORT=${MASTER_PORT:-29500}
RANKS=$((NUM_GPUS * NUM_NODES))
if [ "$GPUS_HERE" -eq 0 ]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    CORES=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES / NUM_GPUS > 0 ? CORES / NUM_GPUS : 1))}
fi

# Model
NUM_LAYERS=${NUM_LAYERS:-12}
HIDDEN_SIZE=${HIDDEN_SIZE:-768}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-$((4 * HIDDEN_SIZE))}
NUM_ATTN_HEADS=${NUM_ATTN_HEADS:-12}
SEQ_LEN=${SEQ_LEN:-1024}
INIT_STD=${INIT_STD:-0.014}

# Mixture. EP_SIZE is the number of experts, as in Megatron-DeepSpeed's scripts; EP_PARALLEL_SIZE how many ranks share
# them: as many as divide both experts and ranks.
EP_SIZE=${EP_SIZE:-64}
largest_common_divisor() { if [ "$2" -eq 0 ]; then echo "$1"; else largest_common_divisor "$2" $(($1 % $2)); fi; }
EP_PARALLEL_SIZE=${EP_PARALLEL_SIZE:-$([ "$EP_SIZE" -gt 0 ] && largest_common_divisor "$EP_SIZE" "$RANKS" || echo 1)}
EP_INTERVAL=${EP_INTERVAL:-2}
MOE_FFN_HIDDEN_SIZE=${MOE_FFN_HIDDEN_SIZE:-$((HIDDEN_SIZE / 2))}
GATE=${GATE:-threshold}
TOPK=${TOPK:-}
THRESHOLD=${THRESHOLD:-$([ "$GATE" = threshold ] && echo 0.9 || true)}
MLC=${MLC:-}
# Capacity: 0 is dropless. MOE_DROP_TOKEN=true makes the recipe's 8.0 the default (1.1 for MoE++, whose factor is times
# the choices per token), false overrules the factors.
MOE_DROP_TOKEN=${MOE_DROP_TOKEN:-}
MOE_TRAIN_CAP_FACTOR=${MOE_TRAIN_CAP_FACTOR:-$([ "$MOE_DROP_TOKEN" != true ] && echo 0 || { [ "$GATE" = moepp ] && echo 1.1 || echo 8.0; })}
MOE_EVAL_CAP_FACTOR=${MOE_EVAL_CAP_FACTOR:-$MOE_TRAIN_CAP_FACTOR}
[ "$MOE_DROP_TOKEN" = false ] && MOE_TRAIN_CAP_FACTOR=0 MOE_EVAL_CAP_FACTOR=0
MOE_MIN_CAP=${MOE_MIN_CAP:-4}

# Training
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
# The micro-batch: the largest up to 16 that divides a rank's share.
largest_micro_batch() {
    local size=16
    while [ "$size" -gt 1 ] && [ $((GLOBAL_BATCH_SIZE % (size * RANKS))) -ne 0 ]; do size=$((size - 1)); done
    echo "$size"
}
BATCH_SIZE=${BATCH_SIZE:-$(largest_micro_batch)}
TRAIN_TOKENS=${TRAIN_TOKENS:-}
TRAIN_ITERS=${TRAIN_ITERS:-60000}
LR=${LR:-4.5e-4}
MIN_LR=${MIN_LR:-4.5e-6}
WARMUP_FRACTION=${WARMUP_FRACTION:-0.1}
PRECISION=${PRECISION:-bf16}
ZERO_STAGE=${ZERO_STAGE:-1}
ACTIVATION_CHECKPOINT=${ACTIVATION_CHECKPOINT:-false}
SEED=${SEED:-1234}
LOG_INTERVAL=${LOG_INTERVAL:-10}
EVAL_INTERVAL=${EVAL_INTERVAL:-1000}
EVAL_ITERS=${EVAL_ITERS:-10}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}

# Data and output
DATA_PATH=${DATA_PATH:-dataset/corpus_text_document}
STREAMING_DATA_PATH=${STREAMING_DATA_PATH:-} # text instead of DATA_PATH, encoded while training
VALID_DATA_PATH=${VALID_DATA_PATH:-}         # with it: shards to evaluate on, unless EVAL_ITERS=0
VOCAB_PATH=${VOCAB_PATH:-dataset/gpt2-vocab.json}
MERGE_PATH=${MERGE_PATH:-dataset/gpt2-merges.txt}
TOKENIZER_TYPE=${TOKENIZER_TYPE:-GPT2BPETokenizer}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-}
NAME=${NAME:-gpt-${NUM_LAYERS}l-${HIDDEN_SIZE}h-${EP_SIZE}e-${GATE}${TOPK:+-k$TOPK}${THRESHOLD:+-t$THRESHOLD}}
OUTPUT_DIR=${OUTPUT_DIR:-runs/$NAME}

flags=(
    --num-layers "$NUM_LAYERS" --hidden-size "$HIDDEN_SIZE" --ffn-hidden-size "$FFN_HIDDEN_SIZE"
    --num-attention-heads "$NUM_ATTN_HEADS" --seq-length "$SEQ_LEN" --init-method-std "$INIT_STD"
    --micro-batch-size "$BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
    --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-fraction "$WARMUP_FRACTION"
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --zero-stage "$ZERO_STAGE" --seed "$SEED"
    --log-interval "$LOG_INTERVAL" --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS"
    --save "$OUTPUT_DIR/checkpoints" --save-interval "$SAVE_INTERVAL"
    --tensorboard-dir "$OUTPUT_DIR/tensorboard" --metrics-file "$OUTPUT_DIR/metrics.jsonl"
    --tokenizer-type "$TOKENIZER_TYPE"
)
# These may hold several words: weights and prefixes (or files, patterns, folders) in turn. `read` expands no patterns.
if [ -n "$STREAMING_DATA_PATH" ]; then
    read -ra words <<<"$STREAMING_DATA_PATH"
    flags+=(--streaming-data-path "${words[@]}")
    read -ra words <<<"$VALID_DATA_PATH"
    [ -n "$VALID_DATA_PATH" ] && flags+=(--valid-data-path "${words[@]}" --test-data-path "${words[@]}")
else
    read -ra words <<<"$DATA_PATH"
    flags+=(--data-path "${words[@]}")
fi
if [ "$TOKENIZER_TYPE" = GPT2BPETokenizer ]; then
    flags+=(--vocab-file "$VOCAB_PATH" --merge-file "$MERGE_PATH")
else
    flags+=(--tokenizer-model "$TOKENIZER_MODEL")
fi
if [ "$EP_SIZE" -gt 0 ]; then
    flags+=(
        --num-experts "$EP_SIZE" --moe-expert-parallel-size "$EP_PARALLEL_SIZE" --gate "$GATE"
        ${THRESHOLD:+--threshold "$THRESHOLD"} ${MLC:+--moe-loss-coeff "$MLC"}
        --moe-train-capacity-factor "$MOE_TRAIN_CAP_FACTOR" --moe-eval-capacity-factor "$MOE_EVAL_CAP_FACTOR"
        --moe-min-capacity "$MOE_MIN_CAP"
    )
    if [ "$GATE" = peer ]; then # its own flags say which layers are mixtures and how wide an expert is
        flags+=(${TOPK:+--peer-topk "$TOPK"})
    else
        flags+=(--expert-interval "$EP_INTERVAL" --moe-ffn-hidden-size "$MOE_FFN_HIDDEN_SIZE" ${TOPK:+--topk "$TOPK"})
    fi
fi
if [ -n "$TRAIN_TOKENS" ]; then flags+=(--train-tokens "$TRAIN_TOKENS"); else flags+=(--train-iters "$TRAIN_ITERS"); fi
[ "$PRECISION" = fp32 ] || flags+=("--$PRECISION")
[ "$ACTIVATION_CHECKPOINT" = true ] && flags+=(--recompute-activations)
[ -f "$OUTPUT_DIR/checkpoints/latest" ] && flags+=(--load "$OUTPUT_DIR/checkpoints")
flags+=("$@")

launcher=(deepspeed --num_gpus "$NUM_GPUS" --num_nodes "$NUM_NODES" --master_port "$MASTER_PORT")
[ -n "$HOSTFILE" ] && launcher+=(--hostfile "$HOSTFILE")
[ -n "$MASTER_ADDR" ] && launcher+=(--master_addr "$MASTER_ADDR")
command=("${launcher[@]}" "$REPO/pretrain_gpt.py" "${flags[@]}")

if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
    exec "$PYTHON" "$REPO/tools/model_size.py" "${flags[@]}"
fi
if [ "$NUM_NODES" -gt 1 ] && [ -z "$HOSTFILE" ]; then
    echo "run.sh: NUM_NODES is $NUM_NODES but HOSTFILE is empty; set HOSTFILE to a file of lines 'host slots=$NUM_GPUS'" >&2
    exit 2
fi
mkdir -p "$OUTPUT_DIR"
"${command[@]}" 2>&1 | tee -a "$OUTPUT_DIR/log.txt"
