#!/usr/bin/env bash
# Continue the pretraining of a Qwen2-MoE, such as Qwen1.5-MoE-A2.7B: 60 experts, four per token, and a shared expert with a
# gate of its own.
set -euo pipefail
EXAMPLE=models/Qwen1.5-MoE-A2.7B
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
