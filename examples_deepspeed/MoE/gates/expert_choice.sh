#!/usr/bin/env bash
# Expert choice: each expert takes its best tokens. Not causal: for analysis, not for language modelling.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=expert_choice
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
