"""The configuration reference (docs/configuration.md), written from ``conf/``, the typed schemas and their comments.

A key's meaning is the comment on its line in a file of ``conf/<group>/`` (the group's default choice first), else the
comment on its field in ``study/schemas.py``. A key without either is an error.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import typing
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import yaml
from omegaconf import MISSING

from xlstm_scaling.corpus.settings import CorpusSettings, TokenizerSettings
from xlstm_scaling.study import schemas
from xlstm_scaling.study.config import GROUPS, ConfigError, conf_dir
from xlstm_scaling.study.files import write_text_atomic
from xlstm_scaling.study.schemas import SCHEMAS

COMMENT = re.compile(r"\s#\s+(.*?)\s*$")
#: longer values are left to the file
MAX_VALUE_CHARACTERS = 48
#: groups whose files share hardly a key's value: their values stay in the files
WITHOUT_VALUES = ("study",)
#: the group whose files are all taken, a file an architecture; each sets keys of other groups
ARCHITECTURE = "architecture"
#: what reads an untyped group: its types
READERS = {"corpus": CorpusSettings, "tokenizer": TokenizerSettings}
ENVIRONMENT = {
    "XLSTM_SCALING_CONF": "the folder `conf/`; default: the one beside the sources",
    "XLSTM_SCALING_PAPER": "the folder of the paper's published files (docs/published.md)",
    "XLSTM_SCALING_LOG": "level of the log: DEBUG (shows tracebacks of expected errors too), INFO, WARNING",
    "XLSTM_SCALING_CACHE": "where compiled kernels and composed configurations lie; default: `~/.cache/xlstm-scaling`",
    "XLSTM_SCALING_KEEP_CONFIGURATIONS": "0: compose every configuration anew",
    "XLSTM_SCALING_CPP": "0: without the C++ kernels for CPUs (docs/kernels.md)",
    "XLSTM_SCALING_MATRIX_UNITS": "off: without the CPU's bf16 matrix units; emulated: in plain C++ (docs/kernels.md)",
    "XLSTM_SCALING_KERNEL_TABLES": "a folder of tuned sizes of the Triton kernels (docs/kernels.md)",
}
#: set and read by the workflow itself
INTERNAL = ("XLSTM_SCALING_SESSION",)


@dataclass
class Entry:
    """One key of a file: its value (None of a mapping that is descended into) and its comment."""

    value: Any
    comment: str | None


@dataclass(frozen=True)
class Choice:
    """One file of a group: the sentence at its top, and its entries by dotted key."""

    name: str
    about: str
    entries: dict[str, Entry]


@dataclass(frozen=True)
class Key:
    """A row of the reference; ``values`` by choice."""

    name: str
    type: str
    meaning: str
    values: dict[str, str]


def _header(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def _entries(node: yaml.Node, lines: list[str], prefix: str = "") -> dict[str, Entry]:
    """Entries of a mapping node, nested ones under dotted keys beside the mapping itself."""
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        name = f"{prefix}{key_node.value}"
        if name == "defaults":
            continue
        block = isinstance(value_node, yaml.MappingNode) and not value_node.flow_style and value_node.value
        line = lines[key_node.start_mark.line if block else value_node.end_mark.line]
        match = COMMENT.search(line)
        text = yaml.serialize(value_node)
        entries[name] = Entry(yaml.safe_load(text), match.group(1) if match else None)
        if isinstance(value_node, yaml.MappingNode) and not value_node.flow_style:
            entries |= _entries(value_node, lines, f"{name}.")
    return entries


def read_choice(path: Path, group: str) -> Choice:
    """A file of a group with what it takes from others by ``defaults``."""
    text = path.read_text()
    node = yaml.compose(text)
    entries: dict[str, Entry] = {}
    for default in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(default, str) and default != "_self_":
            entries |= read_choice(path.with_name(f"{default}.yaml"), group).entries
    own = _entries(node, text.splitlines())
    if "@package _global_" in text and group != ARCHITECTURE:  # holds several groups: its own is under its name
        own = {name.removeprefix(f"{group}."): entry for name, entry in own.items() if name.startswith(f"{group}.")}
    for name, entry in own.items():
        inherited = entries.get(name)
        entries[name] = Entry(entry.value, entry.comment or (inherited.comment if inherited else None))
    return Choice(path.stem, _header(text), entries)


def _field_comments(cls: type) -> dict[str, str]:
    """Comments on (or right above) the lines of a dataclass's fields."""
    source = inspect.getsource(cls)
    lines = source.splitlines()
    comments = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            match = COMMENT.search(lines[node.end_lineno - 1])
            if match:
                comments[node.target.id] = match.group(1)
    return comments


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union:
        names = [_type_name(item) for item in typing.get_args(annotation)]
        return " or ".join(sorted(names, key=lambda name: name == "null"))
    if annotation is NoneType:
        return "null"
    if annotation is Any:
        return "any"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"{_type_name(arguments[0])} → {_type_name(arguments[1])}"
    return annotation.__name__


def _inferred_type(values: list[Any]) -> str:
    """The types that values in YAML have, most general number first."""

    def name(value: Any) -> str:
        if isinstance(value, list):
            return f"list of {_inferred_type([item for item in value if item is not None])}" if value else "list"
        return {NoneType: "null", dict: "mapping"}.get(type(value), type(value).__name__)

    names = {name(value) for value in values if value != "???"} or {"str"}
    if any(item.startswith("list of") for item in names):
        names.discard("list")
    if names == {"null"}:
        return "optional"
    if "float" in names:
        names.discard("int")
    return " or ".join(sorted(names, key=lambda item: (item == "null", item)))


@dataclass
class _Field:
    type: str
    default: Any
    comment: str | None


def _schema(cls: type, prefix: str = "") -> dict[str, _Field]:
    """Dotted keys of a typed group; ``<name>`` stands for keys that the user chooses."""
    hints, comments, result = typing.get_type_hints(cls, vars(schemas)), _field_comments(cls), {}
    for item in fields(cls):
        annotation, name = hints[item.name], f"{prefix}{item.name}"
        arguments = typing.get_args(annotation)
        if is_dataclass(annotation):
            result |= _schema(annotation, f"{name}.")
        elif typing.get_origin(annotation) is dict and is_dataclass(arguments[1]):
            result |= _schema(arguments[1], f"{name}.<{'architecture' if item.name == 'heads' else 'name'}>.")
        else:
            default = item.default if item.default is not NO_DEFAULT else item.default_factory()
            result[name] = _Field(_type_name(annotation), default, comments.get(item.name))
    return result


def _shown(value: Any) -> str:
    if value is None:
        return "`null`"
    if value in ("???", MISSING):
        return "*to be given*"
    if isinstance(value, float) and not 1e-4 <= abs(value) < 1e7 and value != 0:
        mantissa, exponent = f"{value:.12e}".split("e")
        digits = mantissa.rstrip("0")
        return f"`{digits}0e{exponent}`" if digits.endswith(".") else f"`{digits}e{exponent}`"
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...").strip()
    text = text.replace("|", "\\|")
    return f"`{text}`" if len(text) <= MAX_VALUE_CHARACTERS else "…"


def _leaves(choices: list[Choice]) -> list[str]:
    """Keys with a value of their own: a mapping counts as one unless a key below it has a comment."""
    names = list(dict.fromkeys(name for choice in choices for name in choice.entries))
    described = {name for choice in choices for name, entry in choice.entries.items() if entry.comment}
    leaves: list[str] = []
    for name in names:
        mapping = any(isinstance(c.entries[name].value, dict) for c in choices if name in c.entries)
        descended = mapping and any(other.startswith(f"{name}.") for other in described)
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        if not descended and not any(parent in leaves for parent in parents):
            leaves.append(name)
    return leaves


def group_choices(group: str) -> list[Choice]:
    """The files of a group, the one that conf/config.yaml takes first."""
    defaults = yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"]
    first = next(item[group] for item in defaults if isinstance(item, dict) and group in item)
    paths = sorted((conf_dir() / group).glob("*.yaml"), key=lambda path: (path.stem != first, path.stem))
    return [read_choice(path, group) for path in paths]


def group_keys(group: str) -> list[Key]:
    """The rows of a group. Raises ConfigError where a key has no description."""
    choices = group_choices(group)
    typed = _schema(SCHEMAS[group]) if group in SCHEMAS else {}
    if group in WITHOUT_VALUES:
        names = list(typed)
    else:
        leaves = _leaves(choices)
        # an untyped mapping of the schema gives way to the keys that the files have below it
        known = [name for name in typed if not any(leaf.startswith(f"{name}.") for leaf in leaves)]
        names = [name for name in leaves if not any(name.startswith(f"{other}.") for other in known)]
        names += [name for name in known if name not in names]
    kinds = {name: _type_name(kind) for name, kind in typing.get_type_hints(READERS.get(group, object)).items()}
    keys, silent = [], []
    for name in names:
        entries = {choice.name: choice.entries[name] for choice in choices if name in choice.entries}
        meaning = next((entry.comment for entry in entries.values() if entry.comment), None)
        item = typed.get(name)
        meaning = meaning or (item.comment if item else None)
        if meaning is None:
            silent.append(f"{group}.{name}")
            continue
        absent = _shown(item.default) if item else "–"
        values = {name: _shown(entry.value) for name, entry in entries.items()}
        values = {choice.name: values.get(choice.name, absent) for choice in choices}
        if group in WITHOUT_VALUES:
            values = {"default": absent}
        kind = item.type if item else kinds.get(name) or _inferred_type([entry.value for entry in entries.values()])
        keys.append(Key(f"{group}.{name}", kind, meaning, values))
    if silent:
        raise ConfigError(
            f"no description of {', '.join(silent)}: write one as a comment on the key's line in conf/{group}/, "
            "or on its field in src/study/schemas.py"
        )
    return keys


def _cell(text: str) -> str:
    """Text of a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _group_section(group: str, default: str) -> list[str]:
    choices, keys = group_choices(group), group_keys(group)
    lines = [f"## {group}", ""]
    rows = [[f"[`{group}={c.name}`](../conf/{group}/{c.name}.yaml)", _cell(c.about)] for c in choices]
    lines += [*_table([f"choice (default: `{default}`)", "what"], rows), ""]
    columns = list(keys[0].values)
    rows = [[f"`{key.name}`", key.type, _cell(key.meaning), *(key.values[c] for c in columns)] for key in keys]
    return [*lines, *_table(["key", "type", "meaning", *columns], rows), ""]


INTRODUCTION = """# Configuration

<!-- written by `xlstm-scaling config-reference --out docs/configuration.md` from the comments in conf/ and
src/study/schemas.py; edit those -->

Every setting of `conf/`. A study is one choice a group (`study=smoke`, `corpus=folder`) and overrides of single keys
(`training.seed=1`), in [Hydra's syntax](https://hydra.cc/docs/advanced/override_grammar/basic/). An unknown key or a
value of the wrong type is an error before any work starts.

```bash
xlstm-scaling config study=smoke training.seed=1                              # the resolved configuration
snakemake -n --cores 2 --config study=smoke overrides="[training.seed=1]"     # the same in the workflow
```

`null`: not set. *to be given*: there is no default. –: no key of this choice. …: long, see the file. The file of a
study may set keys of other groups too (`tokenizer.vocab_size`); what it sets counts for that study.

Groups: {groups}. Beside them, claims of the paper ([claims.md](claims.md)) and mappings of published tables
([published.md](published.md)) are YAML files of their own form.
"""


def architecture_keys() -> list[Key]:
    """The rows of conf/architecture: what belongs to one architecture. Raises ConfigError as `group_keys`."""
    keys, silent = [], []
    for path in sorted((conf_dir() / ARCHITECTURE).glob("*.yaml")):
        choice = read_choice(path, ARCHITECTURE)
        for name in _leaves([choice]):
            entry = choice.entries[name]
            if entry.comment is None:
                silent.append(f"{name} ({path.name})")
            else:
                keys.append(Key(name, _inferred_type([entry.value]), entry.comment, {"default": _shown(entry.value)}))
    if silent:
        raise ConfigError(f"no description of {', '.join(silent)}: write one as a comment on the key's line")
    return keys


def _architecture_section() -> list[str]:
    paths = sorted((conf_dir() / ARCHITECTURE).glob("*.yaml"))
    rows = [[f"[{p.stem}](../conf/architecture/{p.name})", _cell(_header(p.read_text()))] for p in paths]
    lines = [
        f"## {ARCHITECTURE}",
        "",
        "All of these are taken; `study.architectures` says which of them a study compares.",
        "",
    ]
    lines += [*_table(["architecture", "what"], rows), ""]
    rows = [[f"`{key.name}`", key.type, _cell(key.meaning), key.values["default"]] for key in architecture_keys()]
    return [*lines, *_table(["key", "type", "meaning", "default"], rows), ""]


def _workflow_section() -> list[str]:
    path = conf_dir().parent / "workflow" / "schemas" / "config.schema.yaml"
    rows = []
    for name, item in yaml.safe_load(path.read_text())["properties"].items():
        if "set by the Snakefile" in item.get("description", ""):
            continue
        kinds = item.get("enum") or [kind["type"] for kind in item.get("anyOf", [item])]
        default = f"; default: `{item['default']}`" if "default" in item else ""
        rows.append([f"`{name}`", " or ".join(kinds), f"{_cell(item['description'])}{default}"])
    intro = "`snakemake --config KEY=VALUE` ([schema](../workflow/schemas/config.schema.yaml)):"
    return ["## The workflow's own settings", "", intro, "", *_table(["key", "type", "meaning"], rows), ""]


def reference() -> str:
    """docs/configuration.md as text. Raises ConfigError where a key has no description."""
    defaults = yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"]
    chosen = {group: name for item in defaults if isinstance(item, dict) for group, name in item.items()}
    groups = sorted(GROUPS, key=list(chosen).index)
    lines = [INTRODUCTION.format(groups=", ".join(f"[{group}](#{group})" for group in [*groups, ARCHITECTURE]))]
    for group in groups:
        lines += _group_section(group, chosen[group])
    lines += [*_architecture_section(), *_workflow_section()]
    rows = [[f"`{name}`", meaning] for name, meaning in ENVIRONMENT.items()]
    lines += ["## Environment variables", "", *_table(["variable", "meaning"], rows)]
    return "\n".join(lines) + "\n"


def run_reference(args: argparse.Namespace) -> int:
    """``xlstm-scaling config-reference``: print the reference, or write it."""
    if args.out is None:
        print(reference(), end="")
    else:
        write_text_atomic(args.out, reference())
    return 0
