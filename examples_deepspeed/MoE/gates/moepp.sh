#!/usr/bin/env bash
# MoE++: zero-computation experts (zero, copy, constant), and a residual connection between the gates of MoE layers.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=moepp
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
