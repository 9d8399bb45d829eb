#!/usr/bin/env bash
# XMoE: as few experts per token as reach 90 % of its routing mass.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=threshold
TOPK=${TOPK:-} # no cap on experts per token
export THRESHOLD=${THRESHOLD:-0.9}
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
