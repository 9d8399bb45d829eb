# Sourced by run.sh and demo.sh, which define `fail`: the GPUs of this machine that a run may use, and a launcher that
# uses just these. DeepSpeed's launcher drops CUDA_VISIBLE_DEVICES when it is given a number of GPUs.
set -euo pipefail

# Set GPUS_HERE to the number of GPUs that the run may use on this machine, 0 for a run on the CPU, and GPU_LIST to
# their numbers, separated by commas, or to nothing if CUDA_VISIBLE_DEVICES is not set. nvidia-smi also lists MIG
# devices, and prints its errors to stdout, so only lines of GPUs count.
find_gpus() {
    GPUS_HERE=0
    GPU_LIST=
    local visible=${CUDA_VISIBLE_DEVICES-all}
    case ${visible// /} in
    "" | -1 | NoDevFiles) export DS_ACCELERATOR=cpu ;; # what schedulers set for a job without GPUs
    esac
    [ "${DS_ACCELERATOR:-}" != cpu ] || return 0
    local gpus
    gpus=$({ nvidia-smi -L 2>/dev/null || true; } | LC_ALL=C grep -aE '^GPU [0-9]+:' || true)
    [ -n "$gpus" ] || return 0
    local total
    total=$(wc -l <<<"$gpus")
    GPUS_HERE=$total
    [ "$visible" != all ] || return 0
    local device number
    local numbers=()
    while read -r device; do
        [ "$device" != -1 ] || break # CUDA ignores what follows
        if [[ $device =~ ^[0-9]+$ ]] && [ "$device" -lt "$total" ]; then
            number=$((10#$device))
        else
            number=$(gpu_of_uuid "$device" "$gpus") || fail "CUDA_VISIBLE_DEVICES is '$visible'; allowed: numbers from 0 to $((total - 1)), or UUIDs GPU-... of the $total GPU(s) that nvidia-smi lists"
            export CUDA_DEVICE_ORDER=PCI_BUS_ID # the order of nvidia-smi
        fi
        [[ " ${numbers[*]-} " != *" $number "* ]] || fail "CUDA_VISIBLE_DEVICES is '$visible', which names GPU $number twice"
        numbers+=("$number")
    done < <(tr ',' '\n' <<<"${visible// /}")
    GPUS_HERE=${#numbers[@]}
    GPU_LIST=$(IFS=, && echo "${numbers[*]}")
}

# Print the number of the GPU whose UUID begins with $1, if there is exactly one in nvidia-smi's list $2.
gpu_of_uuid() {
    [[ $1 == GPU-?* ]] || return 1
    local line
    line=$(LC_ALL=C grep -aF "(UUID: $1" <<<"$2") || return 1
    [ "$(wc -l <<<"$line")" -eq 1 ] || return 1
    line=${line#GPU }
    echo "${line%%:*}"
}

# Print the first $1 numbers of GPU_LIST.
first_gpus() { cut -d, -f"1-$1" <<<"$GPU_LIST"; }

# Set LAUNCHER to the command that starts $1 ranks on this machine, without messages of its own.
set_local_launcher() {
    LAUNCHER=(deepspeed --log_level critical)
    if [ -n "$GPU_LIST" ]; then LAUNCHER+=(--include "localhost:$(first_gpus "$1")"); else LAUNCHER+=(--num_gpus "$1"); fi
}
