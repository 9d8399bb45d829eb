#!/usr/bin/env bash
# Expert threshold: each expert takes the tokens above its own threshold, TOPK experts per token on average.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=expert_threshold
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
