"""The command line: every command leads to its function."""

import argparse
import importlib
import inspect
import json

import pytest

from xlstm_scaling import cli


def commands():
    (action,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_names_a_function_of_its_arguments(name):
    module, _, function = commands()[name].get_default("handler").partition(":")
    handler = getattr(importlib.import_module(f"xlstm_scaling.{module}"), function)
    assert list(inspect.signature(handler).parameters) == ["args"]


def test_the_stages_are_those_that_can_be_run():
    from xlstm_scaling.stage_commands import _STAGES

    stages = {name for name, sub in commands().items() if sub.get_default("handler") == "stage_commands:run_stage"}
    assert stages == set(_STAGES)


def test_counts_are_those_of_the_model(capsys):
    from xlstm_scaling.accounting import make_shape
    from xlstm_scaling.models import build_model

    sizes = {"embedding-dim": 32, "num-blocks": 3, "num-heads": 2, "vocab-size": 61, "context-length": 64}
    words = ["--arch=hybrid", "--attention-every=2", *(f"--{name}={size}" for name, size in sizes.items())]
    assert cli.run_command(["count", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = build_model(make_shape("hybrid", 32, 3, 2, 61, attention_every=2))
    assert found["num_params"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["flops_forward_backward"] == 3 * found["flops_forward"]
    parts = sum(found[f"flops_{part}"] for part in ("linear", "sequence_mixing", "other"))
    assert parts == pytest.approx(found["flops_forward"])
