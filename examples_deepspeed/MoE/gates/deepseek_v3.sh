#!/usr/bin/env bash
# DeepSeek-V3: sigmoid scores, experts in groups, shared experts, a bias in place of a strong balance loss.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=deepseek_v3
SHARED=${SHARED:-2}
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
# The paper's: 8 groups, of which a token may use 4.
[ "$SCALE" = demo ] && groups=(--n-group 2 --topk-group 1) || groups=(--n-group 8 --topk-group 4)
launch --moe-shared-experts "$SHARED" "${groups[@]}" "$@"
