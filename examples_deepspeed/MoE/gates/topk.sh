#!/usr/bin/env bash
# Top-k (GShard, Switch, Mixtral, OLMoE): the k experts with the highest softmax scores.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=topk
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
