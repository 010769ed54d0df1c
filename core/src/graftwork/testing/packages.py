"""Lay plugins out in a folder as an installer would; where the folder is on the path, they are found."""

from __future__ import annotations

from pathlib import Path


def install_plugin(
    site: Path,
    name: str,
    target: str,
    code: str | None = None,
    *,
    version: str = "1.0",
    package: str | None = None,
) -> None:
    """Write the metadata of a distribution that offers the plugin ``name`` at ``target`` (``module:Class``).

    ``code`` is written as that module; ``package`` is ``graftwork-<name>`` where not given.
    """
    package = package or f"graftwork-{name}"
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[graftwork.plugins]\n{name} = {target}\n")
    if code is not None:
        (site / f"{target.partition(':')[0]}.py").write_text(code)
