#!/usr/bin/env bash
# LongCat-Flash: FFN experts and identity paths; biases hold the mean number of FFN experts at two thirds of TOPK.
# SCALE=demo (default), 158m, 679m or xmoe: see scale.sh.
set -euo pipefail
GATE=longcat
. "$(dirname "${BASH_SOURCE[0]}")/scale.sh"
launch "$@"
