"""Checks the built site: a page may load nothing from another host."""

import re
from pathlib import Path
from typing import Any

LOADS = re.compile(
    r"<(?:script|img|iframe|source|video|audio|object|embed)\b[^>]*\b(?:src|data)=[\"']?(?:https?:)?//[^\"' >]+"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|icon|preload|preconnect|modulepreload))[^>]*"
    r"\bhref=[\"']?(?:https?:)?//[^\"' >]+"
    r"|url\([\"']?(?:https?:)?//[^)]+|@import\s+[\"'](?:https?:)?//[^\"']+"
)


def on_post_build(config: Any) -> None:
    """End the build if a page or a style sheet loads something from elsewhere."""
    site = Path(config["site_dir"])
    found = [
        f"{file.relative_to(site)}: {load}"
        for file in [*site.rglob("*.html"), *site.rglob("*.css")]
        for load in LOADS.findall(file.read_text("utf-8"))
    ]
    if found:
        raise SystemExit("pages load from other hosts:\n" + "\n".join(found))
