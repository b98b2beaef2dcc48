"""Links, anchors, images and files that the documentation names exist."""

import ast
import glob
import importlib
import re
from urllib.parse import unquote, urlsplit

import pytest
from pages import REPOSITORY, anchors, blocks, inline_code, markdown_files, name, tokens, written_configurations

FILES = markdown_files()
SUFFIXES = "py|cpp|hpp|yaml|md|smk|rst|toml|lock"
FOLDERS = ("src/", "conf/", "docs/", "tests/", "workflow/", "benchmarks/", "profiles/", ".ci/")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_links_and_images_lead_somewhere(path):
    wrong = []
    for token in tokens(path):
        reference = token.attrGet("href") if token.type == "link_open" else None
        reference = token.attrGet("src") if token.type == "image" else reference
        if reference is None or urlsplit(reference).scheme:
            continue
        parts = urlsplit(reference)
        target = path.parent / unquote(parts.path) if parts.path else path
        if not target.exists() or not target.resolve().is_relative_to(REPOSITORY):
            wrong.append(f"{name(path)}:{token.map[0] + 1}: no file {reference}")
        elif parts.fragment and parts.fragment not in anchors(target):
            wrong.append(f"{name(path)}:{token.map[0] + 1}: no heading #{parts.fragment} in {name(target.resolve())}")
        elif token.type == "image" and target.stat().st_size < 1000:
            wrong.append(f"{name(path)}:{token.map[0] + 1}: {reference} is hardly an image")
    assert not wrong, "\n".join(wrong)


def sources() -> list[str]:
    """Paths of the repository's own files, for names like `accounting/hardware.py`."""
    kept = [*FOLDERS, "Snakefile", "Makefile"]
    return [name(p) for top in kept for p in [*(REPOSITORY / top).rglob("*"), REPOSITORY / top] if p.is_file()]


SOURCES = sources()


def exists(text: str) -> bool:
    """Whether a path with `*`, {a,b} or <name> names a file or folder, from the repository's root or below a folder."""
    pattern = re.sub(r"<[^>]*>", "*", text).rstrip("/")
    match = re.search(r"\{([^}]*)\}", pattern)
    if match:
        return all(exists(pattern.replace(match.group(0), item.strip(), 1)) for item in match.group(1).split(","))
    if glob.glob(str(REPOSITORY / pattern)):  # noqa: PTH207 - patterns with ** and hidden folders
        return True
    expression = re.compile("(^|/)" + re.escape(pattern).replace(r"\*", "[^/]*") + "($|/)")
    return any(expression.search(source) for source in SOURCES)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_named_files_exist(path):
    """In `code`: whatever starts with a folder of ours, and every path that ends like a source."""
    wrong, written = [], {f"conf/{name}" for file in FILES for name in written_configurations(file)}
    for code in inline_code(path):
        for word in re.findall(r"[\w./{},*<>-]+", code.text):
            word = word.rstrip(".,")
            ours = word.startswith(FOLDERS) and "/" in word
            looks = re.search(rf"/[\w*{{}},-]+\.({SUFFIXES})$", word) and not word.startswith(
                ("/", "results/", "../", "~")
            )
            if "//" in word or "fits/" in word or "data/" in word or "paper_plots" in word or "inference_time" in word:
                continue  # addresses, tables of a study, files of the paper's authors
            if (ours or looks) and word not in written and not exists(word):
                wrong.append(f"{code.where}: no file {word}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_python_examples_import_what_there_is(path):
    for block in blocks(path):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text, block.where)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xlstm_scaling"):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{block.where}: {node.module} has no {', '.join(missing)}"


def test_every_page_is_reached_from_the_readme():
    """A page of docs/ that the README does not link to is not found by a reader."""
    readme = REPOSITORY / "README.md"
    linked = {token.attrGet("href") for token in tokens(readme) if token.type == "link_open"}
    pages = {f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")}
    assert not sorted(pages - {link.split("#")[0] for link in linked if link})
