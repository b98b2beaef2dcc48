"""Configuration: what is unknown or mistyped is named before any work starts."""

import pytest

from xlstm_scaling.study.config import ConfigError, compose, normalise_overrides, to_dict

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
    ],
)
def test_a_bad_override_is_named(override, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        compose([override])


def test_overrides_in_any_form():
    expected = ["study=smoke", "training.seed=2"]
    assert normalise_overrides(expected) == expected
    assert normalise_overrides("[study=smoke, training.seed=2]") == expected
    assert normalise_overrides("study=smoke training.seed=2") == expected
    assert normalise_overrides(None) == []


def test_a_composed_configuration_cannot_change():
    config = compose([])
    with pytest.raises(Exception, match="read-only"):
        config.training.seed = 3
