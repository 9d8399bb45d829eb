# Sourced by the gate scripts in this folder after they have set GATE. Sets run.sh's variables for SCALE and defines
# `launch`, which starts the training and accepts further flags. A variable of run.sh set by the caller takes precedence.
#   demo   6 layers of hidden size 256, 16 experts, 4 per token, on text from this machine: minutes on two CPU cores
#   158m   LibMoE's small shape: 16 layers, hidden 512, 66 experts of width 128, 8 per token
#   679m   LibMoE's large shape: 18 layers, hidden 1024, 66 experts of width 256, 8 per token
#   xmoe   XMoE's recipe, run.sh's defaults: 12 layers, hidden 768, 64 experts of width 384 in every 2nd layer, 8 per token
# All gates are dropless, so that they can be compared, unless MOE_DROP_TOKEN or a capacity factor is set.
# SHARED=n replaces n of the experts, and n of the experts per token, by shared experts. COARSE=1 is for gates with one
# expert per token: k times fewer experts, each k times as wide, where k is the others' experts per token. Both keep the
# total and the active number of parameters.
set -euo pipefail
MOE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SHARED=${SHARED:-0}
COARSE=${COARSE:-0}

shape() { # layers hidden heads experts width per-token
    export NUM_LAYERS=${NUM_LAYERS:-$1} HIDDEN_SIZE=${HIDDEN_SIZE:-$2} NUM_ATTN_HEADS=${NUM_ATTN_HEADS:-$3}
    local experts=$(($4 - SHARED)) width=$5 per_token=$(($6 - SHARED))
    [ "$COARSE" = 0 ] || experts=$(($4 / $6)) width=$(($5 * $6)) per_token=
    export EP_SIZE=${EP_SIZE:-$experts} MOE_FFN_HIDDEN_SIZE=${MOE_FFN_HIDDEN_SIZE:-$width}
    [ "${TOPK-$per_token}" = "" ] || export TOPK=${TOPK:-$per_token}
}

PROGRAM=$MOE/run.sh
SCALE=${SCALE:-demo}
case $SCALE in
demo)
    PROGRAM=$MOE/demo.sh
    export DATA_DIR=${DATA_DIR:-runs/demo/data} OUTPUT_DIR=${OUTPUT_DIR:-runs/demo-$GATE}
    shape 6 256 4 16 256 4
    ;;
158m) export EP_INTERVAL=${EP_INTERVAL:-1} && shape 16 512 8 66 128 8 ;;
679m) export EP_INTERVAL=${EP_INTERVAL:-1} && shape 18 1024 16 66 256 8 ;;
xmoe) shape 12 768 12 64 384 8 ;;
*)
    echo "SCALE is '$SCALE'; allowed: demo 158m 679m xmoe" >&2
    exit 2
    ;;
esac
export GATE
[ -n "${MOE_DROP_TOKEN:-}" ] || export MOE_TRAIN_CAP_FACTOR=${MOE_TRAIN_CAP_FACTOR:-0}
# Print the flags for DeepSeek's expert groups: 8 groups, of which a token may use $1, if the number of routed experts
# is a multiple of 8; otherwise 2 groups, of which a token uses 1.
grouped() { if [ $((EP_SIZE % 8)) = 0 ]; then echo --n-group 8 --topk-group "$1"; else echo --n-group 2 --topk-group 1; fi; }
launch() {
    [ "$SHARED" = 0 ] || set -- --moe-shared-experts "$SHARED" "$@"
    exec bash "$PROGRAM" "$@"
}
