#!/usr/bin/env bash
# TC-MoE: ternary expert choice; the output of an expert is added, subtracted or left out.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=tcmoe
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
