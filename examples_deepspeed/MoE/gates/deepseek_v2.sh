#!/usr/bin/env bash
# DeepSeek-V2: device-limited routing, shared experts, and three balance losses per sequence.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=deepseek_v2
SHARED=${SHARED:-2}
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch $(grouped 3) "$@"
