# Sourced by the scripts of this folder, which set the defaults of their family: train from the weights of a Hugging Face
# model, export the result as a Hugging Face model, and generate with transformers.
#   INIT_FROM_HF=models/Mixtral-8x7B-v0.1 DATA_PATH=data/corpus_text_document bash continue/mixtral.sh
# Every variable of run.sh may be set. The weights are read from the files of INIT_FROM_HF, each rank its part; nothing
# is converted first. Running again resumes. OUTPUT_DIR/hf-N is the exported model, which other programs load; the
# export is skipped with EXPORT=false, and the text with PROMPT= (empty).
set -euo pipefail
FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$FOLDER/../../.." && pwd)
[ -n "${INIT_FROM_HF:-}" ] || {
    echo "$(basename "$0"): INIT_FROM_HF is empty; set it to the folder of a downloaded model, such as $EXAMPLE" >&2
    exit 2
}
export INIT_FROM_HF LR=${LR:-1e-5} MIN_LR=${MIN_LR:-1e-6} WARMUP_FRACTION=${WARMUP_FRACTION:-0.01}
export SEQ_LEN=${SEQ_LEN:-4096} GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256} TRAIN_ITERS=${TRAIN_ITERS:-2000}
export SAVE_INTERVAL=${SAVE_INTERVAL:-500} ZERO_STAGE=${ZERO_STAGE:-1} ACTIVATION_CHECKPOINT=${ACTIVATION_CHECKPOINT:-true}
# The folder that run.sh would choose: another gate is another run.
export OUTPUT_DIR=${OUTPUT_DIR:-runs/${NAME:-continue-$(basename "$INIT_FROM_HF")${GATE:+-${GATE//[^A-Za-z0-9_-]/-}}}}
PYTHON=${PYTHON:-$([ -x "$REPO/.venv/bin/python" ] && echo "$REPO/.venv/bin/python" || command -v python3)}
export PYTHON
PROMPT=${PROMPT-Once upon a time}

bash "$REPO/examples_deepspeed/MoE/run.sh" "$@"
# One process exports: the node with rank 0, after the run has ended on all nodes.
if [ "${DRY_RUN:-0}" = 1 ] || [ "${EXPORT:-true}" != true ] || [ "${NODE_RANK:-0}" != 0 ]; then exit 0; fi
LATEST=$(cat "$OUTPUT_DIR/checkpoints/latest")
HF=$OUTPUT_DIR/hf-${LATEST#iter_}
[ -d "$HF" ] || "$PYTHON" "$REPO/tools/convert_to_hf.py" "$OUTPUT_DIR/checkpoints" "$HF"
[ -z "$PROMPT" ] || "$PYTHON" "$FOLDER/generate.py" "$HF" --prompt "$PROMPT"
