#!/usr/bin/env bash
# A gate per layer, like DeepSeek-V4: in the first layers, whose hidden states say little, the token id selects the
# experts and a router weighs them; DeepSeek-V3's gate routes in the others. GATE is the list; SCALE=demo (default),
# 158m, 679m or xmoe: see gates/scale.sh.
set -euo pipefail
GATE=${GATE:-hash@0-1,deepseek_v3@2-}
OUTPUT_DIR=${OUTPUT_DIR:-runs/gate_per_layer}
export OUTPUT_DIR
. "$(dirname "${BASH_SOURCE[0]}")/gates/scale.sh"
launch --hash.learned-weights "$@"
