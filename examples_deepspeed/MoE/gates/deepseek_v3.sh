#!/usr/bin/env bash
# DeepSeek-V3: sigmoid scores, experts in groups, shared experts, a bias in place of a strong balance loss.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=deepseek_v3
SHARED=${SHARED:-2}
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
# The paper's: 8 groups, of which a token may use 4, where the experts that are not shared divide by 8.
[ $((EP_SIZE % 8)) = 0 ] && groups=(--n-group 8 --topk-group 4) || groups=(--n-group 2 --topk-group 1)
launch "${groups[@]}" "$@"
