"""docs/configuration.md is what the configuration says of itself."""

import re
import shutil

import pytest
from pages import REPOSITORY

from xlstm_scaling.study import reference as reference_module
from xlstm_scaling.study.config import GROUPS, ConfigError, compose, conf_dir, to_dict
from xlstm_scaling.study.reference import ENVIRONMENT, INTERNAL, architecture_keys, group_keys, reference


def test_page_is_up_to_date(monkeypatch):
    monkeypatch.delenv("XLSTM_SCALING_CONF", raising=False)  # the tests' own settings
    written = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert written == reference(), "stale: xlstm-scaling config-reference --out docs/configuration.md"


@pytest.fixture(scope="module")
def described():
    """What the reference has a row for: keys, and all below a key that is described as a whole."""
    rows = [key.name for group in GROUPS for key in group_keys(group)] + [key.name for key in architecture_keys()]
    patterns = [re.escape(row).replace("<architecture>", "[^.]+").replace("<name>", "[^.]+") for row in rows]
    return re.compile("|".join(f"(?:{pattern})(?:\\..*)?" for pattern in patterns))


@pytest.mark.parametrize("study", ["laptop", "paper"])
def test_every_composed_key_is_described(study, described):
    """What Hydra composes, key by key, has a row or lies in a described mapping; no comment is read for it."""

    def leaves(value, prefix):
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from leaves(item, f"{prefix}.{key}")
        else:
            yield prefix

    names = list(leaves(to_dict(compose([f"study={study}"])), ""))
    assert len(names) > 100
    assert not [name for name in names if not described.fullmatch(name.lstrip("."))]


def test_values_are_those_that_hydra_composes():
    rows = {key.name: key.values for key in group_keys("training")}
    for choice in ("laptop", "smoke"):
        training = compose([f"training={choice}"]).training
        assert rows["training.batch.base_tokens"][choice] == f"`{training.batch.base_tokens}`"
        assert rows["training.optimizer.beta2"][choice] == f"`{training.optimizer.beta2}`"
        assert rows["training.validation.evaluations"][choice] == f"`{training.validation.evaluations}`"


def test_a_key_without_description_is_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "conf"
    shutil.copytree(conf_dir(), folder)
    path = folder / "evaluation" / "default.yaml"
    path.write_text(path.read_text() + "mystery: 3\n")
    monkeypatch.setenv("XLSTM_SCALING_CONF", str(folder))
    with pytest.raises(ConfigError, match=r"evaluation\.mystery"):
        group_keys("evaluation")


def test_environment_variables_are_listed():
    named = set()
    for top in ("src", "workflow", "conf", "Makefile", "Snakefile"):
        for path in [REPOSITORY / top, *(REPOSITORY / top).rglob("*")]:
            if path.suffix in (".py", ".yaml", ".smk", "") and path.is_file() and path.name != "reference.py":
                named |= set(re.findall(r"XLSTM_SCALING_[A-Z_]+\b", path.read_text()))
    assert named == set(ENVIRONMENT) | set(INTERNAL)
    assert reference_module.__doc__
