"""Lay out plugins in a folder as an installer would; on PYTHONPATH they are found."""

from __future__ import annotations

from pathlib import Path


def install(folder: Path, plugin: str, target: str) -> None:
    """Write the metadata of a distribution that offers ``plugin`` at ``target`` (``module:Class``)."""
    info = folder / f"{plugin.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {plugin}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[graftwork.plugins]\n{plugin} = {target}\n")
