#!/usr/bin/env bash
# DeepSeek-V3: sigmoid scores, group-limited routing, shared experts, and a bias per expert instead of a strong balance
# loss.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=deepseek_v3
SHARED=${SHARED:-2}
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch $(grouped 4) "$@"
