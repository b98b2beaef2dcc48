"""Composed configurations that are kept: the same as composed anew, and never those of other files or settings."""

import shutil

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ReadonlyConfigError

from xlstm_scaling.study import composed, config
from xlstm_scaling.study.machine import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def conf(monkeypatch, tmp_path):
    """A configuration folder and a cache of the test's own."""
    folder = shutil.copytree(config.conf_dir(), tmp_path / "conf")
    monkeypatch.setenv("XLSTM_SCALING_CONF", str(folder))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return folder


@pytest.fixture
def times_composed(monkeypatch):
    calls = []
    compose = config._compose
    monkeypatch.setattr(config, "_compose", lambda overrides: calls.append(overrides) or compose(overrides))
    return calls


OVERRIDES = ["study=smoke", "training.seed=3"]


def test_composed_once_for_the_same_settings(times_composed):
    first, second = config.compose(OVERRIDES), config.compose(OVERRIDES)
    assert len(times_composed) == 1
    assert first == second
    assert second.training.seed == 3
    with pytest.raises(ReadonlyConfigError):
        second.training.seed = 4
    config.compose(["study=smoke", "training.seed=4"])
    assert len(times_composed) == 2


def test_a_changed_file_or_checking_code_is_composed_anew(conf, monkeypatch, times_composed):
    before = config.compose(OVERRIDES)
    path = conf / "study" / "smoke.yaml"
    path.write_text(path.read_text().replace(f"title: {before.study.title}", "title: another"))
    assert config.compose(OVERRIDES).study.title == "another" != before.study.title
    monkeypatch.setattr(composed, "__file__", str(conf / "composed.py"))
    for name in ("config.py", "schemas.py"):
        (conf / name).write_text("# other code")
    config.compose(OVERRIDES)
    assert len(times_composed) == 3


def test_the_environment_is_read_when_it_is_asked_for(monkeypatch, times_composed):
    published = ["study=paper", "runs=published"]
    for folder in ("one", "two"):
        monkeypatch.setenv("XLSTM_SCALING_PAPER", folder)
        assert config.to_dict(config.compose(published).runs)["folder"] == folder
    assert len(times_composed) == 1


@pytest.mark.parametrize("content", [b"", b"torn", b"\x80\x04K\x01."])
def test_a_damaged_file_is_composed_anew(tmp_path, times_composed, content):
    expected = config.compose(OVERRIDES)
    (kept,) = (tmp_path / "cache" / "configurations").iterdir()
    kept.write_bytes(content)
    assert config.compose(OVERRIDES) == expected
    assert config.compose(OVERRIDES) == expected
    assert len(times_composed) == 2


def test_switched_off_or_without_a_place_it_composes(tmp_path, monkeypatch, times_composed):
    (tmp_path / "cache").write_text("no folder")
    config.compose(OVERRIDES)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "other"))
    monkeypatch.setenv(composed.SWITCH_VARIABLE, "0")
    config.compose(OVERRIDES)
    assert len(times_composed) == 2
    assert not (tmp_path / "other").exists()


def test_the_last_used_are_kept(tmp_path, monkeypatch, times_composed):
    monkeypatch.setattr(composed, "KEPT", 2)
    monkeypatch.setattr(config, "_compose", lambda overrides: OmegaConf.create({"of": overrides}))
    for seed in (1, 2, 1, 3):
        config.compose([f"training.seed={seed}"])
    kept = [composed.pickle.loads(path.read_bytes()) for path in (tmp_path / "cache" / "configurations").iterdir()]
    assert sorted(item["of"][0] for item in kept) == ["training.seed=1", "training.seed=3"]
