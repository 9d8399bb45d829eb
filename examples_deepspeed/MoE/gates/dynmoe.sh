#!/usr/bin/env bash
# DynMoE: every expert whose learned threshold the cosine to the token exceeds.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=dynmoe
TOPK= # this gate has no number of experts per token
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
