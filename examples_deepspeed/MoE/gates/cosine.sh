#!/usr/bin/env bash
# X-MoE: cosine similarity of the projected token and the expert embeddings, with a learnable temperature.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=cosine
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
