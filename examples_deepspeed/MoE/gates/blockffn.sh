#!/usr/bin/env bash
# BlockFFN: all experts with a positive score, after an RMSNorm; losses make neighbours use the same few experts.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=blockffn
TOPK= # this gate has no number of experts per token
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
