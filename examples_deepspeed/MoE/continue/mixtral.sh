#!/usr/bin/env bash
# Continue the pretraining of a Mixtral: 8 experts, two per token, as released. GATE=threshold trains it with another gate.
# Its balance loss is computed per layer here and not over all layers together: see docs/huggingface.md.
set -euo pipefail
EXAMPLE=models/Mixtral-8x7B-v0.1
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
