#!/usr/bin/env bash
# Continue the pretraining of a DeepSeek-V2 or V3: latent attention, shared experts, group-limited routing. FP8 weights are
# dequantised while they are read, and exported in bf16. Layers for multi-token prediction are not trained; the export
# has them as they were.
set -euo pipefail
EXAMPLE=models/DeepSeek-V2-Lite
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
