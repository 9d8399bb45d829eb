#!/usr/bin/env bash
# ReMoE: every expert with a positive score ReLU(W x); an adaptive L1 loss drives their number towards TOPK.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=remoe
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
