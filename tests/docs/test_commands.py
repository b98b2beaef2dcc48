"""Commands of the documentation parse: programs, subcommands, options, configuration, targets."""

import argparse
import ast
import importlib.util
import re
import shutil
import tomllib
from functools import cache

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pages import REPOSITORY, Command, commands, inline_code, markdown_files, name, written_configurations

from xlstm_scaling import cli, experiments
from xlstm_scaling.study.config import ConfigError, compose, conf_dir, normalise_overrides

FILES = markdown_files()
COMMANDS = [command for path in FILES for command in commands(path)]


class Wrong(Exception):
    pass


def raising(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser that raises where it would leave the process."""

    def error(message: str) -> None:
        raise Wrong(message)

    parser.error = error
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                raising(sub)
    return parser


@cache
def our_parser() -> argparse.ArgumentParser:
    return raising(cli._parser())


@cache
def snakemake_parser() -> argparse.ArgumentParser:
    return raising(pytest.importorskip("snakemake.cli").get_argument_parser())


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    """The configuration, with the files that pages tell the reader to write (a YAML block that begins `# conf/…`)."""
    folder = tmp_path_factory.mktemp("docs") / "conf"
    shutil.copytree(conf_dir(), folder)
    for path in FILES:
        for named, text in written_configurations(path).items():
            (folder / named).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLSTM_SCALING_CONF", str(folder))
        yield folder


@cache
def composed(choices: tuple[str, ...]):
    return compose(choices)


def check_overrides(overrides: list[str]) -> None:
    """Choices of groups compose; single keys are there, and take the value. One composition a set of choices."""
    single = [item for item in overrides if "." in item.split("=")[0] and not item.startswith("+")]
    config = composed(tuple(item for item in overrides if item not in single)).copy()
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, True)
    for item in single:
        key, _, value = item.partition("=")
        try:
            OmegaConf.update(config, key, OmegaConf.create({"value": yaml.safe_load(value)}).value)
        except OmegaConfBaseException as error:
            raise Wrong(f"{item}: {error}") from None


def check_ours(command: Command) -> None:
    if command.words in (("--help",), ("--version",)):
        return
    if "--help" in command.words:
        our_parser().parse_args([word for word in command.words if word != "--help"][:1])
        return
    arguments = our_parser().parse_args(command.words)
    overrides = list(getattr(arguments, "overrides", [])) + list(getattr(arguments, "config", []) or [])
    check_overrides(overrides)


@cache
def rules() -> set[str]:
    texts = [path.read_text() for path in [REPOSITORY / "Snakefile", *(REPOSITORY / "workflow").rglob("*.smk")]]
    return {rule for text in texts for rule in re.findall(r"^\s*rule (\w+):", text, re.M)} | set(
        experiments.EXPERIMENTS
    )


def check_snakemake(command: Command) -> None:
    words = list(command.words) if command.program == "snakemake" else ["--config", *command.words]
    arguments = snakemake_parser().parse_args([*words, "--cores", "1"])
    schema = yaml.safe_load((REPOSITORY / "workflow" / "schemas" / "config.schema.yaml").read_text())["properties"]
    if stray := [item for item in arguments.config or [] if "=" not in item]:
        raise Wrong(f"--config takes {', '.join(stray)} for a setting: targets stand before it")
    given = dict(item.split("=", 1) for item in arguments.config or [])
    if unknown := sorted(set(given) - set(schema)):
        raise Wrong(f"no setting {', '.join(unknown)} of the workflow")
    overrides = [f"study={given['study']}"] if "study" in given else []
    overrides += [f"runs={given['runs']}"] if "runs" in given else []
    check_overrides([*overrides, *normalise_overrides(given.get("overrides"))])
    for profile in (arguments.workflow_profile, arguments.profile):
        if profile and not (REPOSITORY / profile / "config.yaml").is_file():
            raise Wrong(f"no profile {profile}")
    targets = set(arguments.targets or [])
    if strange := sorted(target for target in targets - rules() if "/" not in target):
        raise Wrong(f"no target {', '.join(strange)}")


def check_make(command: Command) -> None:
    text = (REPOSITORY / "Makefile").read_text()
    targets = {word for line in re.findall(r"^([\w -]+):(?!=)", text, re.M) for word in line.split()}
    variables = set(re.findall(r"^([A-Z_]+) *\?=", text, re.M))
    for word in command.words:
        key, _, value = word.partition("=")
        if value or word.endswith("="):
            if key not in variables:
                raise Wrong(f"no variable {key} of the Makefile")
            if key == "STUDY":
                check_overrides([f"study={value}"])
            if key == "CONFIG":
                config = dict(item.split("=", 1) for item in re.findall(r'\w+=(?:"[^"]*"|\S+)', value))
                check_overrides(normalise_overrides(config.get("overrides", "").strip('"')))
        elif word not in targets:
            raise Wrong(f"no target {word}")


def script_options(path) -> set[str]:
    """Options that a script adds to its parsers, read and not run."""
    tree = ast.parse(path.read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    return {a.value for call in calls for a in call.args if isinstance(a, ast.Constant)} | {"--help"}


def check_python(command: Command) -> None:
    script, *words = command.words
    if script == "-m":
        module, *words = words
        if importlib.util.find_spec(module) is None:
            raise Wrong(f"no module {module}")
        return
    if script.startswith("-"):
        return
    path = REPOSITORY / script
    if not path.is_file():
        raise Wrong(f"no script {script}")
    words = words[: words.index("--")] if "--" in words else words
    if script == "benchmarks/record.py" and words and (REPOSITORY / words[0]).suffix == ".py":
        return check_python(Command(command.where, "python", tuple(words)))
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in script_options(path)]
    if unknown:
        raise Wrong(f"{script} has no option {', '.join(unknown)}")
    return None


def check_pip(command: Command) -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in command.words:
        named = re.match(r"(?:xlstm-scaling|\.)\[([\w,]+)\]$", word)
        if named and (unknown := set(named.group(1).split(",")) - set(extras)):
            raise Wrong(f"no extra {', '.join(unknown)}")


CHECKS = {
    "xlstm-scaling": check_ours,
    "snakemake": check_snakemake,
    "--config": check_snakemake,
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_commands_parse(path, conf):
    wrong = []
    for command in commands(path):
        try:
            CHECKS.get(command.program, lambda command: None)(command)
        except (Wrong, ConfigError) as error:
            wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_commands_in_running_text_exist(path):
    """In `code`: the subcommand and the options, which need not be all that it takes."""
    subcommands = next(a for a in our_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    wrong = []
    for code in inline_code(path):
        words = code.text.split()
        if words[:1] == ["xlstm-scaling"] and len(words) > 1 and re.fullmatch(r"[a-z][a-z-]*", words[1]):
            if words[1] not in subcommands:
                wrong.append(f"{code.where}: no command {words[1]}")
                continue
            known = subcommands[words[1]]._option_string_actions
            wrong += [
                f"{code.where}: {words[1]} has no option {word}"
                for word in re.findall(r"(?<!\S)--[a-z-]+", code.text)
                if word not in known
            ]
        elif words[:1] == ["make"]:
            try:
                check_make(Command(code.where, "make", tuple(word for word in words[1:] if "=" not in word)))
            except Wrong as error:
                wrong.append(f"{code.where}: {error}")
        elif words[:1] == ["python"] and len(words) > 1 and words[1].startswith("benchmarks/"):
            try:
                check_python(Command(code.where, "python", tuple(words[1:])))
            except Wrong as error:
                wrong.append(f"{code.where}: {error}")
    assert not wrong, "\n".join(wrong)


def test_overrides_may_stand_after_options():
    arguments = cli._parse(["train", "study=smoke", "--run", "x", "training.seed=5"])
    assert arguments.overrides == ["study=smoke", "training.seed=5"] and arguments.run == "x"
    for words in (["train", "study=smoke", "--rum", "x"], ["memory", "a=b"]):
        with pytest.raises(SystemExit):
            cli._parse(words)


def test_there_are_commands_to_check():
    """The reader of pages finds what a person sees in them."""
    seen = {command.program for command in COMMANDS}
    assert {"xlstm-scaling", "snakemake", "make", "python"} <= seen
    assert sum(command.where.startswith("README.md") for command in COMMANDS) > 10


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("xlstm-scaling", ("frain", "study=smoke")),
        ("xlstm-scaling", ("train", "study=smoke", "--rum", "x")),
        ("xlstm-scaling", ("plan", "study=smok")),
        ("xlstm-scaling", ("plan", "study=smoke", "training.sead=1")),
        ("snakemake", ("--cores", "2", "--config", "stody=smoke")),
        ("snakemake", ("--cores", "2", "figurs")),
        ("snakemake", ("--cores", "2", "--config", "overrides=[trainin.seed=1]")),
        ("make", ("reproduse",)),
        ("make", ("reproduce", "STUDI=smoke")),
        ("python", ("benchmarks/dag.py", "--ruins", "5")),
        ("python", ("benchmarks/nothing.py",)),
        ("pip", ("install", "xlstm-scaling[trakking]")),
    ],
)
def test_a_wrong_command_is_found(program, words, conf):
    with pytest.raises((Wrong, ConfigError)):
        CHECKS[program](Command("here", program, words))
