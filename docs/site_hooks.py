"""What the site adds to MkDocs: pages and notebooks from the repository, links that hold on both, MathML, flags."""

from __future__ import annotations

import html
import posixpath
import re
import tomllib
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
TOP_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
    "SECURITY.md": "security.md",
}
"""Pages that lie above docs/, and what they are called on the site."""

_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
_CODE = re.compile(r"<code>[^<]*--[^<]*</code>")
_FLAG = re.compile(r"--[a-z][a-z-]*")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the project's addresses from pyproject.toml."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    config.site_url = urls.get("Documentation", "")
    if "Repository" in urls:
        config.repo_url, config.repo_name = urls["Repository"], "metareg"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie above docs/, and a page for each notebook with the outputs that it was committed with."""
    for source, target in TOP_PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        places = {"unique_key": path.stem, "output_files_dir": f"{path.stem}-files"}
        text, resources = MarkdownExporter().from_filename(str(path), resources=places)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    del config, files
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]
    names = {target: source for source, target in TOP_PAGES.items()}
    source = names.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def move(match: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = TOP_PAGES.get(file) or file.removeprefix("docs/").replace(".ipynb", ".md")
        relative = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{relative}{match[3] or ''}{match[4]}"

    return _LINK.sub(move, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML, which browsers show without a script, and keep flags on one line."""
    del page, config, files

    def convert(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(match[2]), display=display)

    content = _CODE.sub(lambda code: _FLAG.sub(r'<span class="flag">\g<0></span>', code[0]), content)
    return _FORMULA.sub(convert, content)
