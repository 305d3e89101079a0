"""README and documents: what they link to is there, and the index names every document."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers import ROOT, tracked

PAGES = tracked("*.md", "docs/*.md", "tools/*.md", "datasets/*.md")
LINK = re.compile(r"\]\(([^()\s]+)\)")


def prose(page: Path) -> str:
    """A page without its blocks of code, which hold neither links nor headings."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in addresses: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page):
    broken = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "code", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_index_names_every_document():
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    names = {page.name for page in tracked("docs/*.md")} - {"README.md"}
    assert len(names) > 8
    assert {name for name in names if f"]({name})" not in index} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_commands_name_are_there(page):
    """Programs and configs in commands, but for those that a reader is told to write."""
    programs = re.findall(r"(?<!/)\b(?:tools/\w+\.py|(?:train|test)\.py)", page.read_text("utf-8"))
    configs = re.findall(r"--config (config/[\w+/.]+\.yaml)", page.read_text("utf-8"))
    assert [name for name in {*programs, *configs} if not (ROOT / name).is_file()] == []
