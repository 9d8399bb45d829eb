#!/usr/bin/env bash
# Continue the pretraining of an OLMoE: 64 experts, eight per token.
set -euo pipefail
EXAMPLE=models/OLMoE-1B-7B-0924
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
