"""What the tests read from Markdown files: headings, links, images, code and command lines."""

import itertools
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPOSITORY = Path(__file__).resolve().parents[2]
#: installed, or written by stages
NOT_OURS = {".venv", ".snakemake", "results", "outputs", "build", ".pytest_cache", ".ruff_cache", ".hypothesis"}
PROGRAMS = ("xlstm-scaling", "make", "snakemake", "python", "pip", "pytest", "ruff", "--config")


def markdown_files() -> list[Path]:
    """All Markdown files of the repository."""
    found = REPOSITORY.rglob("*.md")
    return sorted(path for path in found if not NOT_OURS & set(path.relative_to(REPOSITORY).parts))


def name(path: Path) -> str:
    """Path below the repository, for messages."""
    return path.relative_to(REPOSITORY).as_posix()


@cache
def tokens(path: Path) -> tuple[Token, ...]:
    """All tokens of a file, inline ones after the block that holds them."""
    flat: list[Token] = []
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text()):
        flat.append(token)
        for child in token.children or []:
            child.map = token.map
            flat.append(child)
    return tuple(flat)


@cache
def anchors(path: Path) -> frozenset[str]:
    """Anchors of the headings as GitHub makes them, and ids written as HTML."""
    seen: dict[str, int] = {}
    found = re.findall(r'<a (?:id|name)="([^"]+)"', path.read_text())
    flat = tokens(path)
    for token, following in itertools.pairwise(flat):
        if token.type == "heading_open":
            text = "".join(child.content for child in following.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            count = seen.get(slug, 0)
            seen[slug] = count + 1
            found.append(f"{slug}-{count}" if count else slug)
    return frozenset(found)


@dataclass(frozen=True)
class Code:
    """A block of code, or a piece of it in a line."""

    path: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{name(self.path)}:{self.line}"


def blocks(path: Path) -> list[Code]:
    """Fenced and indented code; the language of an indented block is ''."""
    found = []
    for token in tokens(path):
        if token.type in ("fence", "code_block"):
            fence = token.type == "fence"
            first = token.map[0] + 1 + fence
            found.append(Code(path, first, token.info.strip() if fence else "", token.content))
    return found


def inline_code(path: Path) -> list[Code]:
    """`code` in running text and tables."""
    return [Code(path, t.map[0] + 1, "", t.content) for t in tokens(path) if t.type == "code_inline"]


@dataclass(frozen=True)
class Command:
    """One program call of a code block, as shell words without assignments before it."""

    where: str
    program: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join([self.program, *self.words])}"


def _words(line: str) -> list[list[str]]:
    """The program calls of a shell line: split at ; && || and pipes."""
    line = re.sub(r"\[(--[\w-]+)[^\]]*\]", r"\1", line)  # [--option | --other] of a synopsis
    line = re.sub(r"<[\w ./-]+>", "PLACEHOLDER", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    calls: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if set(word) <= set(";&|"):
            calls.append([])
        elif set(word) <= set("<>"):
            skip = True  # the file behind a redirection
        elif skip:
            skip = False
        else:
            calls[-1].append(word)
    return calls


def commands(path: Path) -> list[Command]:
    """Calls of our programs in the shell blocks (bash, sh, indented) of a file."""
    found = []
    for block in blocks(path):
        if block.language not in ("bash", "sh", ""):
            continue
        number = block.line
        for line in block.text.replace("\\\n", " " * 2).splitlines():
            begins = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S*\s+)*(?:\S*bin/)?([\w-]+)", line)
            if begins and (begins.group(1) in PROGRAMS or "&&" in line):
                for words in _words(line.strip().removeprefix("$ ")):
                    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                        words.pop(0)
                    program = re.sub(r"^\S*bin/", "", words[0]) if words else ""
                    if program in PROGRAMS:
                        found.append(Command(f"{name(path)}:{number}", program, tuple(words[1:])))
            number += 1
    return found


def written_configurations(path: Path) -> dict[str, str]:
    """Files of conf/ that a page tells the reader to write: YAML whose second line is `# conf/…`."""
    found = {}
    for block in blocks(path):
        named = re.match(r"# @package _global_\n# conf/(\S+\.yaml)\n", block.text)
        if block.language == "yaml" and named:
            found[named.group(1)] = block.text
    return found
