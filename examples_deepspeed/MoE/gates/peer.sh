#!/usr/bin/env bash
# PEER: the middle layer has 1024^2 single-neuron experts, of which 8 heads retrieve 16 each by product keys; the other
# layers are dense. SCALE=demo (default, with 128^2 experts), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=peer
TOPK=${TOPK:-16}
SCALE=${SCALE:-demo}
export EP_SIZE=${EP_SIZE:-$([ "$SCALE" = demo ] && echo 16384 || echo 1048576)}
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch --peer-num-heads "${PEER_NUM_HEADS:-8}" "$@"
