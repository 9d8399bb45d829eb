#!/usr/bin/env bash
# MoE++: some experts return zero, the token or a constant, and routing scores remember the layer before.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=moepp
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
