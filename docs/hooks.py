"""What the documentation builds from the code: the page of all options, the changelog, links to edit a page."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from growconv.training import commands

MARK = "<!-- options -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog of the repository."""
    text = (Path(config.config_file_path).parent / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the options; without a repository of its own, a page is edited in the checkout that it was built from."""
    source = page.file.src_uri
    if not config.repo_url and source != "changelog.md":
        page.edit_url = f"{'../' * (page.url.count('/') + 1)}docs/{source}"
    return markdown.replace(MARK, commands.options_page()) if MARK in markdown else markdown
