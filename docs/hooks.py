"""For mkdocs: links that lead out of docs/ work in the site as they do on a code host.

Files outside docs/ that a page links to become files of the site, under their path in the repository. The site's root
is docs/, so the link ../results/demo/table.md of docs/training.md is results/demo/table.md there: one .. less.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#\s:]+)")
IN_NAV = ["CONTRIBUTING.md", "SECURITY.md"]


def on_files(files: Files, config: Any) -> Files:
    paths = set(IN_NAV)
    for file in files.documentation_pages():
        targets = LINK.findall(file.content_string)
        places = [normpath(join("docs", dirname(file.src_uri), target)) for target in targets]
        paths |= {place for place in places if not place.startswith("docs/")}
    for path in sorted(paths):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if not Path(page.file.abs_src_path).is_relative_to(ROOT / "docs"):
        return markdown.replace("](docs/", "](")
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"]({up}../", f"]({up}")
