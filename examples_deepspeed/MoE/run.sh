#!/usr/bin/env bash
# Train a mixture-of-experts GPT. Every setting is an environment variable, so nothing here needs editing:
#   EP_SIZE=64 TOPK=8 THRESHOLD=0.9 DATA_PATH=data/owt_text_document bash examples_deepspeed/MoE/run.sh
# EP_SIZE is the number of experts, as in Megatron-DeepSpeed's scripts; EP_PARALLEL_SIZE is the number of ranks that
# share them. The defaults are XMoE's reference recipe: a token uses as many experts as it takes to reach THRESHOLD of
# its routing probability, and an expert accepts at most 8 x tokens / experts. As in XMoE, TOPK has no effect on this
# gate; MAX_EXPERTS caps the experts of a token, and MOE_DROP_TOKEN=false removes the limit of the experts. Another GATE
# has no limit unless one is set. Running again with the same NAME or OUTPUT_DIR resumes. DRY_RUN=1 prints the command,
# the size of the model and its FLOPs. Arguments are passed on as flags of pretrain_gpt.py. The exit status is that of
# the run; when it failed, the last lines on the screen are its error and the path of the log. CUDA_VISIBLE_DEVICES
# selects the GPUs of this machine, all by default; if it is empty, the run uses the CPU.
#
# INIT_FROM_HF=DIR starts from the weights of a Hugging Face model: its config.json sets the model, experts, gate and
# tokenizer, and only those of their variables that are set here replace something. See continue/ for examples.
#
# Several nodes are launched in one of two ways. Both need a folder tree that every node sees under the same paths:
# this repository, the Python environment, the data, and OUTPUT_DIR, where every rank writes its part of a checkpoint.
#   HOSTFILE=hosts bash run.sh
#       Run once. The launcher reaches the nodes with pdsh over ssh. The file has one line 'name slots=8' per node;
#       NUM_NODES and NUM_GPUS, if set, limit the run to the first nodes and slots.
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 NUM_NODES=2 NUM_GPUS=8 bash run.sh
#       Run on every node, each with its own NODE_RANK, counted from 0; needs no ssh. MASTER_ADDR is the address of
#       node 0. A HOSTFILE may replace NUM_NODES and NUM_GPUS.
# On CPU nodes with several networks, GLOO_SOCKET_IFNAME names the network interface that the nodes share.
set -euo pipefail
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-$([ -x "$REPO/.venv/bin/python" ] && echo "$REPO/.venv/bin/python" || command -v python3)}
export PATH="$(dirname "$PYTHON"):$PATH"

fail() {
    echo "run.sh: $1" >&2
    exit 2
}

. "$REPO/examples_deepspeed/MoE/devices.sh"

# Nodes. NUM_GPUS is the number of ranks per node; without CUDA the ranks are CPU processes.
HOSTFILE=${HOSTFILE:-}
NODE_RANK=${NODE_RANK:-}
NUM_NODES=${NUM_NODES:-}
NUM_GPUS=${NUM_GPUS:-}
MASTER_ADDR=${MASTER_ADDR:-}
MASTER_PORT=${MASTER_PORT:-29500}
for name in NUM_NODES NUM_GPUS; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || fail "$name is '${!name}'; allowed: a positive integer"
done
# Print the number of hosts in a hostfile (DeepSpeed's format), and the smallest and largest number of slots of its
# first NUM_NODES hosts.
hosts_and_slots() {
    awk -v first="${NUM_NODES:-0}" '
        /^[ \t]*(#|$)/ { next }
        !/^[ \t]*[^ \t]+[ \t]+slots=[1-9]/ { error = "is \047" $0 "\047; allowed: \047name slots=8\047"; exit }
        $1 in seen { error = "lists " $1 " twice"; exit }
        { seen[$1]; hosts++; slots = substr($2, 7) + 0 }
        first == 0 || hosts <= first {
            if (hosts == 1 || slots < fewest) fewest = slots
            if (slots > most) most = slots
        }
        END {
            if (error) print "line " NR " " error; else if (!hosts) print "it has no line of the form \047name slots=8\047"
            else print hosts, fewest, most
            exit error || !hosts
        }' "$1"
}
if [ -n "$HOSTFILE" ]; then
    [ -f "$HOSTFILE" ] || fail "HOSTFILE is '$HOSTFILE', which is not a file; create one with a line 'name slots=8' per node"
    found=$(hosts_and_slots "$HOSTFILE") || fail "HOSTFILE is '$HOSTFILE': $found"
    read -r hosts fewest most <<<"$found"
    NUM_NODES=${NUM_NODES:-$hosts}
    [ "$NUM_NODES" -le "$hosts" ] || fail "NUM_NODES is $NUM_NODES; allowed with HOSTFILE '$HOSTFILE': at most $hosts"
    [ -n "$NUM_GPUS" ] || [ "$fewest" -eq "$most" ] ||
        fail "HOSTFILE is '$HOSTFILE': its nodes have $fewest to $most slots, but every node runs the same number of ranks; set NUM_GPUS to at most $fewest"
    NUM_GPUS=${NUM_GPUS:-$fewest}
    [ "$NUM_GPUS" -le "$fewest" ] || fail "NUM_GPUS is $NUM_GPUS; allowed with HOSTFILE '$HOSTFILE': at most $fewest, the smallest number of slots of a node"
fi
if [ -n "$NODE_RANK" ]; then
    [ -n "$NUM_NODES" ] && [ -n "$NUM_GPUS" ] || fail "NODE_RANK is set; also set NUM_NODES and NUM_GPUS, or HOSTFILE"
    [ -n "$MASTER_ADDR" ] || fail "NODE_RANK is set; also set MASTER_ADDR to the address of node 0"
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] && [ "$NODE_RANK" -lt "$NUM_NODES" ] ||
        fail "NODE_RANK is '$NODE_RANK'; allowed with $NUM_NODES node(s): 0 to $((NUM_NODES - 1))"
fi
BY_SSH=$([ -n "$HOSTFILE" ] && [ -z "$NODE_RANK" ] && echo yes || true)
TASKS=${SLURM_STEP_NUM_TASKS:-${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-1}}}
[ -n "$NODE_RANK" ] || [ "${DRY_RUN:-0}" = 1 ] || [ "$TASKS" = 1 ] ||
    fail "srun or mpirun started it $TASKS times, and each would be a run of its own; start it once per node with NODE_RANK (\$SLURM_NODEID), or let them start pretrain_gpt.py"
find_gpus
VISIBLE=${CUDA_VISIBLE_DEVICES-}
unset CUDA_VISIBLE_DEVICES # the launcher sets it for each rank's node
if [ -n "$BY_SSH" ] && [ -n "$VISIBLE" ] && [ "${DS_ACCELERATOR:-}" != cpu ]; then
    [[ ,$VISIBLE, == ",$(seq -s, 0 $((NUM_GPUS - 1))),"* ]] ||
        fail "CUDA_VISIBLE_DEVICES is '$VISIBLE', which does not reach the nodes of HOSTFILE '$HOSTFILE'; unset it, or start each node by itself with NODE_RANK"
    GPU_LIST=
fi
NUM_GPUS=${NUM_GPUS:-$((GPUS_HERE > 0 ? GPUS_HERE : 1))}
[ -z "$GPU_LIST" ] || [ "$NUM_GPUS" -le "$GPUS_HERE" ] ||
    fail "NUM_GPUS is $NUM_GPUS; allowed with CUDA_VISIBLE_DEVICES '$VISIBLE': at most $GPUS_HERE"
NUM_NODES=${NUM_NODES:-1}
RANKS=$((NUM_GPUS * NUM_NODES))
if [ "$GPUS_HERE" -eq 0 ]; then
    [ -n "$BY_SSH" ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} # with ssh, the nodes may have GPUs that this machine lacks
    CORES=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES / NUM_GPUS > 0 ? CORES / NUM_GPUS : 1))}
fi

# Set a variable to a default, unless the model of INIT_FROM_HF sets what it is about.
INIT_FROM_HF=${INIT_FROM_HF:-}
[ -z "$INIT_FROM_HF" ] || [ -f "$INIT_FROM_HF/config.json" ] ||
    fail "INIT_FROM_HF is '$INIT_FROM_HF'; allowed: a folder with the config.json of a Hugging Face model"
default() {
    local value=
    [ -n "$INIT_FROM_HF" ] || value=$2
    printf -v "$1" %s "${!1:-$value}"
}
# Model
default NUM_LAYERS 12
default HIDDEN_SIZE 768
default NUM_ATTN_HEADS 12
SEQ_LEN=${SEQ_LEN:-1024}
default INIT_STD 0.014

# MoE. EP_SIZE is the number of experts, not a parallel size: the name comes from Megatron-DeepSpeed's scripts.
# EP_PARALLEL_SIZE is the number of ranks that share the experts; by default the largest number that divides both the
# experts and the ranks.
if [ -n "$INIT_FROM_HF" ]; then
    EP_SIZE=${EP_SIZE:-$("$PYTHON" -c '
import json, sys
config = json.load(open(sys.argv[1], encoding="utf-8"))
names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
own = config.get("run", {}).get("moe", {})
print(own.get("num_experts") or next((config[name] for name in names if config.get(name)), 0))
' "$INIT_FROM_HF/config.json" 2>/dev/null)} || fail "INIT_FROM_HF is '$INIT_FROM_HF', whose config.json is not a JSON object"
    [ "$EP_SIZE" != 0 ] || [ -z "${GATE:-}" ] ||
        fail "GATE is '$GATE', but the model of INIT_FROM_HF '$INIT_FROM_HF' has no experts; make an MoE model of it with tools/upcycle.py, or leave GATE out"
fi
EP_SIZE=${EP_SIZE:-64}
largest_common_divisor() { if [ "$2" -eq 0 ]; then echo "$1"; else largest_common_divisor "$2" $(($1 % $2)); fi; }
EP_PARALLEL_SIZE=${EP_PARALLEL_SIZE:-$([ "$EP_SIZE" -gt 0 ] && largest_common_divisor "$EP_SIZE" "$RANKS" || echo 1)}
default EP_INTERVAL 2
default MOE_FFN_HIDDEN_SIZE $((HIDDEN_SIZE / 2))
default GATE threshold # or a gate per layer: hash@0-2,deepseek_v3@3- (see docs/gates.md)
# Whether a gate, or `dense`, is the only one or in the list.
has_gate() { [[ ",$GATE" == ",$1" || ",$GATE" == *",$1@"* ]]; }
[[ $GATE != *@* ]] || EP_INTERVAL=1 # the list says which layers are dense
GATE_PATH=${GATE_PATH:-} # Python files or package folders with gates of your own, separated by blanks
EXPERT_TYPE=${EXPERT_TYPE:-} # kind of the routed experts, such as swiglu_clamped; mlp if empty
# The width of dense layers; there are none when every layer is an MoE layer.
if [ "$EP_SIZE" -eq 0 ] || [ "$EP_INTERVAL" != 1 ] || [ "$GATE" = peer ] || has_gate dense; then
    default FFN_HIDDEN_SIZE $((4 * HIDDEN_SIZE))
fi
TOPK=${TOPK:-}
MAX_EXPERTS=${MAX_EXPERTS:-} # of the threshold gate: largest number of experts per token
THRESHOLD=${THRESHOLD:-$(has_gate threshold && echo 0.9 || true)}
MLC=${MLC:-}
# Capacity factors: 0 is dropless, the default of all gates but that of the recipe. MOE_DROP_TOKEN=true sets a default
# for every gate: the recipe's 8.0 for threshold, MoE++'s 1.1, and Switch's 1.25; MOE_DROP_TOKEN=false sets both to 0,
# whatever the other variables are. An expert accepts factor x k x tokens / experts; k is 1 for threshold.
MOE_DROP_TOKEN=${MOE_DROP_TOKEN:-}
[[ $MOE_DROP_TOKEN =~ ^(true|false)?$ ]] || fail "MOE_DROP_TOKEN is '$MOE_DROP_TOKEN'; allowed: true or false"
default_capacity_factor() {
    case $GATE,$MOE_DROP_TOKEN in
    threshold,*) echo 8.0 ;;
    moepp,true) echo 1.1 ;;
    *,true) echo 1.25 ;;
    *) echo 0 ;;
    esac
}
MOE_TRAIN_CAP_FACTOR=${MOE_TRAIN_CAP_FACTOR:-$(default_capacity_factor)}
MOE_EVAL_CAP_FACTOR=${MOE_EVAL_CAP_FACTOR:-$MOE_TRAIN_CAP_FACTOR}
[ "$MOE_DROP_TOKEN" = false ] && MOE_TRAIN_CAP_FACTOR=0 MOE_EVAL_CAP_FACTOR=0
MOE_MIN_CAP=${MOE_MIN_CAP:-} # by default the program's, if there is a capacity

# Training
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
# Print the default micro-batch size: the largest size up to 16 that divides a rank's share of the global batch.
largest_micro_batch() {
    local size=16
    while [ "$size" -gt 1 ] && [ $((GLOBAL_BATCH_SIZE % (size * RANKS))) -ne 0 ]; do size=$((size - 1)); done
    echo "$size"
}
BATCH_SIZE=${BATCH_SIZE:-$(largest_micro_batch)}
TRAIN_TOKENS=${TRAIN_TOKENS:-}   # takes precedence over TRAIN_SAMPLES, and that over TRAIN_ITERS
TRAIN_SAMPLES=${TRAIN_SAMPLES:-}
TRAIN_ITERS=${TRAIN_ITERS:-60000}
LR=${LR:-4.5e-4}
MIN_LR=${MIN_LR:-4.5e-6}
WARMUP_FRACTION=${WARMUP_FRACTION:-0.1}
PRECISION=${PRECISION:-bf16}
ZERO_STAGE=${ZERO_STAGE:-1}
ACTIVATION_CHECKPOINT=${ACTIVATION_CHECKPOINT:-false}
SEED=${SEED:-1234}
LOG_INTERVAL=${LOG_INTERVAL:-10}
EVAL_ITERS=${EVAL_ITERS:-10}
EVAL_INTERVAL=${EVAL_INTERVAL:-$([ "$EVAL_ITERS" = 0 ] || echo 1000)}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}

# Data and output
DATA_PATH=${DATA_PATH:-dataset/corpus_text_document} # a path with blanks needs quotes inside: "'my data/corpus'"
DATA_ARGS_PATH=${DATA_ARGS_PATH:-}           # file with the words of DATA_PATH, which it replaces
STREAMING_DATA_PATH=${STREAMING_DATA_PATH:-} # text files, tokenized during training; replaces DATA_PATH
MOCK_DATA=${MOCK_DATA:-false}                # true: random tokens, without data and tokenizer files
default VOCAB_SIZE 50257                     # with MOCK_DATA=true
SPLIT=${SPLIT:-}                             # shares of DATA_PATH to train, validate and test on; 95,5,0 has no test
VALID_DATA_PATH=${VALID_DATA_PATH:-}         # shards to validate on, instead of a share of DATA_PATH
TEST_DATA_PATH=${TEST_DATA_PATH:-}           # shards to test on, instead of a share of DATA_PATH
VALID_SETS=${VALID_SETS:-}                   # further validation sets: name=shard name=shard
VOCAB_PATH=${VOCAB_PATH:-dataset/gpt2-vocab.json}
MERGE_PATH=${MERGE_PATH:-dataset/gpt2-merges.txt}
default TOKENIZER_TYPE GPT2BPETokenizer
TOKENIZER_MODEL=${TOKENIZER_MODEL:-}
[ -z "$INIT_FROM_HF" ] || NAME=${NAME:-continue-$(basename "$INIT_FROM_HF")${GATE:+-${GATE//[^A-Za-z0-9_-]/-}}}
NAME=${NAME:-gpt-${NUM_LAYERS}l-${HIDDEN_SIZE}h-${EP_SIZE}e-${GATE//[^A-Za-z0-9_-]/-}${TOPK:+-k$TOPK}${THRESHOLD:+-t$THRESHOLD}${MAX_EXPERTS:+-m$MAX_EXPERTS}}
OUTPUT_DIR=${OUTPUT_DIR:-runs/$NAME}
WANDB_PROJECT=${WANDB_PROJECT:-} # also log to this project of Weights & Biases, whose own variables apply (WANDB_MODE, ...)

flags=(
    ${INIT_FROM_HF:+--init-from-hf "$INIT_FROM_HF"}
    ${NUM_LAYERS:+--num-layers "$NUM_LAYERS"} ${HIDDEN_SIZE:+--hidden-size "$HIDDEN_SIZE"}
    ${NUM_ATTN_HEADS:+--num-attention-heads "$NUM_ATTN_HEADS"} --seq-length "$SEQ_LEN" ${INIT_STD:+--init-method-std "$INIT_STD"}
    --micro-batch-size "$BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE"
    --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --zero-stage "$ZERO_STAGE" --seed "$SEED"
    --log-interval "$LOG_INTERVAL" --eval-iters "$EVAL_ITERS"
    --save "$OUTPUT_DIR/checkpoints" --save-interval "$SAVE_INTERVAL"
    --tensorboard-dir "$OUTPUT_DIR/tensorboard" --metrics-file "$OUTPUT_DIR/metrics.jsonl"
    ${TOKENIZER_TYPE:+--tokenizer-type "$TOKENIZER_TYPE"}
    ${WANDB_PROJECT:+--wandb-project "$WANDB_PROJECT" --wandb-exp-name "${WANDB_NAME:-$NAME}" --wandb-save-dir "${WANDB_DIR:-$OUTPUT_DIR}"}
)
# Only flags that apply: the program refuses one that cannot take effect.
is_zero() { [[ $1 =~ ^[0.]*$ ]]; }
is_zero "$WARMUP_FRACTION" || flags+=(--lr-warmup-fraction "$WARMUP_FRACTION")
flags+=(${FFN_HIDDEN_SIZE:+--ffn-hidden-size "$FFN_HIDDEN_SIZE"} ${EVAL_INTERVAL:+--eval-interval "$EVAL_INTERVAL"})
# A data path may hold several words: alternating weights and prefixes (or files, patterns, folders). Words are quoted
# as for xargs, which expands no patterns.
add_words() { # a flag, and the name of the variable that holds its words; nothing if there are none
    local lines words
    lines=$(xargs -r printf '%s\n' <<<"${!2}" 2>&1) || fail "$2 is ${!2}: $lines; quote a path with blanks or quotes: \"'my data/corpus'\""
    [ -n "$lines" ] || return 0
    mapfile -t words <<<"$lines"
    flags+=("$1" "${words[@]}")
}
if [ "$MOCK_DATA" = true ]; then
    flags+=(--mock-data ${VOCAB_SIZE:+--vocab-size "$VOCAB_SIZE"})
elif [ -n "$STREAMING_DATA_PATH" ]; then
    add_words --streaming-data-path STREAMING_DATA_PATH
elif [ -n "$DATA_ARGS_PATH" ]; then
    flags+=(--data-args-path "$DATA_ARGS_PATH")
else
    add_words --data-path DATA_PATH
fi
flags+=(${SPLIT:+--split "$SPLIT"})
add_words --valid-data-path VALID_DATA_PATH
add_words --test-data-path TEST_DATA_PATH
add_words --valid-sets VALID_SETS
if [ "$TOKENIZER_TYPE" != GPT2BPETokenizer ]; then
    flags+=(${TOKENIZER_MODEL:+--tokenizer-model "$TOKENIZER_MODEL"}) # an empty word would be lost by pdsh
elif [ "$MOCK_DATA" != true ]; then
    flags+=(--vocab-file "$VOCAB_PATH" --merge-file "$MERGE_PATH")
fi
if [ "$EP_SIZE" -gt 0 ]; then
    flags+=(
        --num-experts "$EP_SIZE" --moe-expert-parallel-size "$EP_PARALLEL_SIZE" ${GATE:+--gate "$GATE"}
        ${THRESHOLD:+--threshold "$THRESHOLD"} ${MAX_EXPERTS:+--threshold-max-experts "$MAX_EXPERTS"} ${MLC:+--moe-loss-coeff "$MLC"}
        ${MOE_MIN_CAP:+--moe-min-capacity "$MOE_MIN_CAP"}
    )
    add_words --gate-path GATE_PATH
    flags+=(${EXPERT_TYPE:+--expert-type "$EXPERT_TYPE"})
    is_zero "$MOE_TRAIN_CAP_FACTOR" || flags+=(--moe-train-capacity-factor "$MOE_TRAIN_CAP_FACTOR")
    is_zero "$MOE_EVAL_CAP_FACTOR" || flags+=(--moe-eval-capacity-factor "$MOE_EVAL_CAP_FACTOR")
    if has_gate peer; then # PEER has flags of its own for its layers and the width of an expert
        flags+=(${TOPK:+--peer-topk "$TOPK"})
    else
        [[ $GATE == *@* ]] || flags+=(${EP_INTERVAL:+--expert-interval "$EP_INTERVAL"})
        flags+=(${MOE_FFN_HIDDEN_SIZE:+--moe-ffn-hidden-size "$MOE_FFN_HIDDEN_SIZE"} ${TOPK:+--topk "$TOPK"})
    fi
fi
if [ -n "$TRAIN_TOKENS" ]; then
    flags+=(--train-tokens "$TRAIN_TOKENS")
elif [ -n "$TRAIN_SAMPLES" ]; then
    flags+=(--train-samples "$TRAIN_SAMPLES")
else
    flags+=(--train-iters "$TRAIN_ITERS")
fi
[ "$PRECISION" = fp32 ] || flags+=("--$PRECISION")
[ "$ACTIVATION_CHECKPOINT" = true ] && flags+=(--recompute-activations)
# Resume from the newest valid checkpoint if there is one; a --load given by the caller must find one.
[[ " $* " == *" --load"[\ =]* ]] || flags+=(--load "$OUTPUT_DIR/checkpoints" --load-or-init)
flags+=("$@")

set_local_launcher "$NUM_GPUS"
launcher=("${LAUNCHER[@]}" --master_port "$MASTER_PORT")
[ -n "$GPU_LIST" ] || launcher+=(--num_nodes "$NUM_NODES")
# OUTPUT_DIR is shared, so files that each node writes for itself have the node's rank in their name.
LOG=$OUTPUT_DIR/log.txt
NODES=$HOSTFILE
SLOTS=$NUM_GPUS
if [ -n "$NODE_RANK" ]; then
    [ "$NODE_RANK" -eq 0 ] || LOG=$OUTPUT_DIR/log.node-$NODE_RANK.txt
    NODES=${HOSTFILE:-$OUTPUT_DIR/hostfile.node-$NODE_RANK}
    if [ -n "$GPU_LIST" ]; then
        # The launcher wants GPUs by the name of their node, in a hostfile that has as many as their largest number.
        NODES=$OUTPUT_DIR/hostfile.node-$NODE_RANK
        chosen=$(first_gpus "$NUM_GPUS")
        SLOTS=$(($(tr ',' '\n' <<<"$chosen" | sort -n | tail -n 1) + 1))
        include=
        for ((node = 0; node < NUM_NODES; node++)); do
            include+="${include:+@}node-$node"
            [ "$node" -ne "$NODE_RANK" ] || include+=":$chosen"
        done
        launcher=(deepspeed --log_level critical --include "$include" --master_port "$MASTER_PORT")
    fi
    launcher+=(--no_ssh --node_rank "$NODE_RANK")
fi
[ -n "$BY_SSH" ] && launcher+=(--force_multi) # otherwise a hostfile with one host would start on this machine, whatever the host is
[ -n "$NODES" ] && launcher+=(--hostfile "$NODES")
[ -n "$MASTER_ADDR" ] && launcher+=(--master_addr "$MASTER_ADDR")
command=("${launcher[@]}" "$REPO/pretrain_gpt.py" "${flags[@]}")

if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
    exec "$PYTHON" "$REPO/tools/analyze_model.py" --model-only "${flags[@]}"
fi
[ "$NUM_NODES" -eq 1 ] || [ -n "$NODES" ] ||
    fail "NUM_NODES is $NUM_NODES but HOSTFILE is empty; set HOSTFILE to a file with a line 'name slots=$NUM_GPUS' per node, or set NODE_RANK"
[ "$GPUS_HERE" -eq 0 ] || [ -n "$BY_SSH" ] || [ "$NUM_GPUS" -le "$GPUS_HERE" ] ||
    fail "NUM_GPUS is $NUM_GPUS; allowed: at most $GPUS_HERE, the number of GPUs that nvidia-smi lists on this machine"
mkdir -p "$OUTPUT_DIR" 2>/dev/null && touch -a "$LOG" 2>/dev/null || fail "OUTPUT_DIR is '$OUTPUT_DIR', in which no file can be written; choose another one"
if [ "$NODES" != "$HOSTFILE" ]; then # without ssh the launcher only counts the hosts; their names are not used
    for ((node = 0; node < NUM_NODES; node++)); do
        echo "node-$node slots=$([ "$node" -eq "$NODE_RANK" ] && echo "$SLOTS" || echo "$NUM_GPUS")"
    done >"$NODES"
elif [ -n "$BY_SSH" ] && [ -z "${DS_ENV_FILE:-}" ]; then
    # ssh does not pass on the environment. The launcher does, for variables that it knows and for those in this file.
    DS_ENV_FILE=$(cd "$OUTPUT_DIR" && pwd)/environment
    for name in PATH DS_ACCELERATOR OMP_NUM_THREADS GLOO_SOCKET_IFNAME; do
        [ -z "${!name:-}" ] || echo "$name=${!name}"
    done >"$DS_ENV_FILE"
    grep -ahs = ~/.deepspeed_env .deepspeed_env >>"$DS_ENV_FILE" || true # the files that it replaces
    export DS_ENV_FILE
fi
# Print the cause of a failure, from the log after its first $1 bytes: the first error; without one the last line of a
# traceback; then the news that another rank has ended; then the signal by which the launcher ends the ranks that are
# still starting. Ranks on other nodes have the host's name before their lines.
first_error() {
    local new errors error
    local news='error: (another rank|rank [0-9]+) ended' stop='error: SIG(TERM|INT) outside of the training loop'
    new=$(mktemp)
    tail -c "+$(($1 + 1))" "$LOG" >"$new"
    errors=$(LC_ALL=C grep -aE '^([^ ]+: )?(\[rank [0-9]+\] )?error: ' "$new" || true)
    error=$(LC_ALL=C grep -aEv -m 1 "$news|$stop" <<<"$errors" || true)
    [ -n "$error" ] || error=$(LC_ALL=C grep -aE '^([^ ]+: )*[A-Za-z_][A-Za-z0-9_.]*(Error|Exception|Interrupt)(:|$)' "$new" | tail -n 1 || true)
    [ -n "$error" ] || error=$(LC_ALL=C grep -aEv -m 1 "$stop" <<<"$errors" || true)
    [ -n "$error" ] || error=$(head -n 1 <<<"$errors")
    # It is not repeated directly below itself.
    [ -z "$error" ] || [ "$error" = "$(tail -n 1 "$new" | LC_ALL=C tr -d '\0')" ] || echo "$error"
    rm -f "$new"
}

# `tee` ignores signals, so that messages after Ctrl-C or SIGTERM still reach the screen and the log.
logged=$(stat -Lc %s "$LOG")
set +e
"${command[@]}" 2>&1 | (trap '' INT TERM && exec tee -a "$LOG")
ended=("${PIPESTATUS[@]}")
set -e
[ "${ended[1]}" -eq 0 ] || echo "run.sh: $LOG is not complete, because tee could not write it" >&2
if [ "${ended[0]}" -ne 0 ]; then
    first_error "$logged" >&2
    echo "run.sh: exit code ${ended[0]}; log: $LOG" >&2
fi
exit "${ended[0]}"
