#!/usr/bin/env bash
# BASE layers: balanced assignment of tokens to experts, one expert per token.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=base
COARSE=1
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
