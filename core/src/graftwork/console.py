"""What the user sees while a job runs: lines and progress bars on standard error."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Console:
    """Lines and progress bars; silent in all processes but the main one."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def say(self, text: str) -> None:
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def bar(self, total: int | None, label: str, unit: str = "item") -> tqdm[Any]:
        """Return a progress bar; close it (or use it in a ``with`` block) when done."""
        return tqdm(
            total=total,
            desc=label,
            unit=unit,
            file=sys.stderr,
            disable=not self.enabled,
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5,
        )
