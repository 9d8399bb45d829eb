#!/usr/bin/env bash
# A gate per layer, like DeepSeek-V4: the first layers route by token id, which needs no router while hidden states say
# little, and the others by DeepSeek-V3's gate. GATE is the list; SCALE=demo (default), 158m, 679m or xmoe: see
# gates/scale.sh.
set -euo pipefail
GATE=${GATE:-hash@0-1,deepseek_v3@2-}
OUTPUT_DIR=${OUTPUT_DIR:-runs/gate_per_layer}
export OUTPUT_DIR
. "$(dirname "${BASH_SOURCE[0]}")/gates/scale.sh"
launch "$@"
