"""Free space on the disk, checked before a large output is begun."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def require_disk_space(
    output: str | Path,
    needed_bytes: int,
    advice: str = "Free some space there, or write to another disk",
) -> None:
    """Raise OSError unless an output fits on its disk.

    Args:
        output: Path of the output. Neither it nor its parents need to exist yet.
        needed_bytes: Upper bound of the size of the output.
        advice: What the user can do, appended to the message.
    """
    absolute = Path(os.path.abspath(output))
    existing = next(path for path in (absolute, *absolute.parents) if path.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise OSError(
            f"{output} needs {needed_bytes / 1e6:,.1f} MB, but the disk of {existing} has "
            f"{free_bytes / 1e6:,.1f} MB free. {advice}"
        )
