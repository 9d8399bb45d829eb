#!/usr/bin/env bash
# Hash layers: the token id selects the expert, one expert per token.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=hash
COARSE=1
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
