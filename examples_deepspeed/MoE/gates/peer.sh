#!/usr/bin/env bash
# PEER: one middle layer of 1024^2 single neurons, of which 8 heads look up 16 each by product keys; the others are dense.
# SCALE=demo (default: 128^2 neurons), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=peer
TOPK=${TOPK:-16}
SCALE=${SCALE:-demo}
export EP_SIZE=${EP_SIZE:-$([ "$SCALE" = demo ] && echo 16384 || echo 1048576)}
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch --peer-num-heads "${PEER_NUM_HEADS:-8}" "$@"
