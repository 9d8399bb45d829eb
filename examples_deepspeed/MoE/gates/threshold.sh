#!/usr/bin/env bash
# XMoE: the fewest experts per token whose routing probabilities sum to THRESHOLD, 0.9.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=threshold
TOPK=${TOPK:-} # no limit on the experts per token
export THRESHOLD=${THRESHOLD:-0.9}
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
