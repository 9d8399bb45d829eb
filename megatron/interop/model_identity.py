"""Identity of a model's weights, which routing traces carry.

It is that of files: the same weights in another form, such as an exported folder, have another
identity.
"""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.manifest import read_manifest
from megatron.io.content_id import content_id


def checkpoint_identity(path: str | Path) -> str:
    """Return the identity of a checkpoint: that of its manifest, which has the hash of each file.

    Args:
        path: folder of one checkpoint. A copy has the same identity.

    Raises:
        ValueError: its manifest is damaged or missing.
    """
    return f"checkpoint:{read_manifest(Path(path))['checksum'][:32]}"


def hf_identity(folder: str | Path) -> str:
    """Return the identity of a Hugging Face folder: that of its configuration and weights.

    Raises:
        OSError: a file cannot be read.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    return f"hf:{content_id([Path(folder, 'config.json'), *paths])}"
