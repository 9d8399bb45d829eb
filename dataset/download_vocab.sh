#!/usr/bin/env bash
# Downloads GPT-2's vocabulary and merges (MIT licence) to the folder of this script, and checks them:
#   bash dataset/download_vocab.sh
# FOLDER sets another folder; VOCAB_URL and MERGES_URL set other sources. Existing files are kept.
set -euo pipefail
FOLDER=${FOLDER:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
HUGGING_FACE=https://huggingface.co/openai-community/gpt2/resolve/main
OPENAI=https://openaipublic.blob.core.windows.net/gpt-2/encodings/main

fetch() { # url file
    if command -v curl >/dev/null; then
        curl --fail --location --silent --show-error --retry 3 --output "$2" "$1"
    elif command -v wget >/dev/null; then
        wget --quiet --tries 3 --output-document "$2" "$1"
    else
        echo "download_vocab.sh: error: neither curl nor wget is installed. Install one of them" >&2
        exit 2
    fi
}

has_sha256() { echo "$2  $1" | sha256sum --check --status; } # file sha256

get() { # file sha256 url...
    local file=$FOLDER/$1 sum=$2 temp=$FOLDER/.$1.$$.tmp url
    shift 2
    if [ -f "$file" ]; then
        has_sha256 "$file" "$sum" && echo "$file is there" && return
        echo "download_vocab.sh: error: $file is there, but its checksum is wrong. Remove it and run this again" >&2
        exit 2
    fi
    for url in "$@"; do
        if fetch "$url" "$temp" && has_sha256 "$temp" "$sum"; then
            mv "$temp" "$file"
            echo "$file"
            return
        fi
        rm -f "$temp"
        echo "download_vocab.sh: $url could not be fetched, or its checksum is wrong" >&2
    done
    echo "download_vocab.sh: error: no $file. Put it there by hand, or set VOCAB_URL and MERGES_URL" >&2
    exit 2
}

mkdir -p "$FOLDER"
get gpt2-vocab.json 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783 \
    ${VOCAB_URL:-"$HUGGING_FACE/vocab.json" "$OPENAI/encoder.json"}
get gpt2-merges.txt 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5 \
    ${MERGES_URL:-"$HUGGING_FACE/merges.txt" "$OPENAI/vocab.bpe"}
