"""Configuration: what is unknown or mistyped is named before any work starts."""

import shutil

import pytest

from xlstm_scaling.study.config import ConfigError, compose, conf_dir, normalise_overrides, to_dict

STUDIES = ["laptop", "smoke", "paper", "single"]


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_composes(study):
    config = compose([f"study={study}"])
    assert config.study.name == study
    assert to_dict(config)["training"]["optimizer"]["beta2"] == 0.95


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.sed=1", "training.sed"),
        ("training.seed=one", "'one' of type 'str' could not be converted to Integer"),
        ("training.optimizer.beta1=fast", "could not be converted to Float"),
        ("study=nope", r"Available options in 'study':.*laptop"),
        ("study.sizes.d999=1", "d999"),
        ("study.isoflop.c256_h150g.budget_flops=lots", "could not be converted to Float"),
        ("+training.optimizer.momentum=0.9", "momentum"),
        ("hardware.threads_per_run=two", "could not be converted to Integer"),
        ("a=b=c=d", "a"),
        ("study=laptp", "did you mean laptop"),
        ("training.sed=1", "did you mean training.seed"),
        ("training.seed=one", "^training.seed: "),
        ("corpus.path=text", "add corpus=folder"),
        ("+training.optimizer.beta_1=0.9", "did you mean training.optimizer.beta1"),
    ],
)
def test_a_bad_override_is_named(override, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        compose([override])


def test_a_study_without_its_first_line_is_explained(tmp_path, monkeypatch):
    folder = tmp_path / "conf"
    shutil.copytree(conf_dir(), folder)
    text = (folder / "study" / "smoke.yaml").read_text()
    (folder / "study" / "mine.yaml").write_text(text.replace("# @package _global_", "# my study"))
    monkeypatch.setenv("XLSTM_SCALING_CONF", str(folder))
    with pytest.raises(ConfigError, match=r"conf/study/mine\.yaml must begin with the line `# @package _global_`"):
        compose(["study=mine"])


def test_a_setting_that_stands_in_no_file_can_be_overridden(tmp_path, monkeypatch):
    """It has a default in its schema; several at once, and a value of the wrong type is still named."""
    conf = shutil.copytree(conf_dir(), tmp_path / "conf")
    path = conf / "study" / "smoke.yaml"
    text = path.read_text()
    path.write_text(text.replace(", num_heads: null, learning_rate: null", ""))
    assert path.read_text() != text
    monkeypatch.setenv("XLSTM_SCALING_CONF", str(conf))
    study = ["study=smoke", "study.sizes.d16b1.learning_rate=0.01"]
    sizes = compose([*study, "study.sizes.d24b1.num_heads=2"]).study.sizes
    assert (sizes.d16b1.learning_rate, sizes.d16b1.num_heads) == (0.01, None)
    assert (sizes.d24b1.learning_rate, sizes.d24b1.num_heads) == (None, 2)
    with pytest.raises(ConfigError, match=r"^study\.sizes\.d24b1\.learning_rate: "):
        compose([*study, "study.sizes.d24b1.learning_rate=fast"])
    with pytest.raises(ConfigError, match=r"no setting study\.sizes\.d24b1\.num_head; did you mean"):
        compose([*study, "study.sizes.d24b1.num_head=2"])


def test_overrides_in_any_form():
    expected = ["study=smoke", "training.seed=2"]
    assert normalise_overrides(expected) == expected
    assert normalise_overrides("[study=smoke, training.seed=2]") == expected
    assert normalise_overrides("study=smoke training.seed=2") == expected
    assert normalise_overrides(None) == []
    nested = ["architectures=[xlstm,hybrid]", "study.heads.x={num_heads: 1, head_dim: null}", "training.seed=2"]
    assert normalise_overrides(f"[{', '.join(nested)}]") == nested


def test_a_composed_configuration_cannot_change():
    config = compose([])
    with pytest.raises(Exception, match="read-only"):
        config.training.seed = 3
