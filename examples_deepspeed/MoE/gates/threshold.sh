#!/usr/bin/env bash
# XMoE: the fewest experts per token whose routing probabilities sum to THRESHOLD, 0.9; MAX_EXPERTS caps them.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=threshold
TOPK=${TOPK:-} # has no effect on this gate
export THRESHOLD=${THRESHOLD:-0.9}
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
