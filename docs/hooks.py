"""Hooks for mkdocs: links out of docs/ work in the site as they do on a code host.

Files outside docs/ to which a page links become files of the site, under their path in the repository. The root of the
site is docs/, so the link ../results/demo/table.md of docs/training.md becomes results/demo/table.md: one .. less.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#\s:]+)")
IN_NAV = ["CONTRIBUTING.md", "SECURITY.md"]  # pages of the site that are not in docs/


def on_files(files: Files, config: Any) -> Files:
    """Add the linked files outside docs/, and the pages of IN_NAV."""
    paths = set(IN_NAV)
    for file in files.documentation_pages():
        targets = LINK.findall(file.content_string)
        places = [normpath(join("docs", dirname(file.src_uri), target)) for target in targets]
        paths |= {place for place in places if not place.startswith("docs/")}
    for path in sorted(paths):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`markdown` with its links as the site's paths want them."""
    # A page of IN_NAV moves from the repository's root to the site's, which is docs/.
    if not Path(page.file.abs_src_path).is_relative_to(ROOT / "docs"):
        return markdown.replace("](docs/", "](")
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"]({up}../", f"]({up}")
