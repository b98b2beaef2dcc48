"""The coefficients that the page evaluates against `accounting`, at lengths they were not solved at."""

import base64
import math

import numpy as np
import pytest

from xlstm_scaling.accounting import ARCHITECTURES, count_flops, count_params, prefill_work, step_work
from xlstm_scaling.accounting.serving import serving_memory
from xlstm_scaling.explorer.costs import BASIS, MEMORY_TERMS, Form, coefficients, pack, shape_costs
from xlstm_scaling.planning.errors import PlanningError
from xlstm_scaling.planning.shapes import ShapeFamily

GRID = ((512, 1), (512, 6), (768, 15), (1024, 24), (4096, 33))
LENGTHS = (1, 17, 63, 64, 129, 4095, 70001, 3_000_001)
WIDTHS = (2, 4)


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed["f64"]), dtype="<f8").reshape(packed["shape"])


def evaluate(form, length, chunk, size):
    total = sum(
        (unpack(c) * BASIS[name](np.float64(length), chunk) for name, c in form["terms"].items()), np.zeros(size)
    )
    return 1 / total if form["inverse"] else total


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def counted(request):
    shapes = [ShapeFamily(request.param).shape(*dims) for dims in GRID]
    return shapes, shape_costs(shapes, WIDTHS)


def test_packed_numbers_are_exact():
    values = np.array([[math.pi, np.nan], [-1e300, 5e-324]])
    np.testing.assert_array_equal(unpack(pack(values)), values)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("phase", "work"), [("prefill", prefill_work), ("step", step_work)])
def test_work_at_other_lengths_and_batches(counted, phase, work, width):
    shapes, costs = counted
    forms = costs[phase] | costs["widths"][str(width)][phase]
    for length in LENGTHS:
        for name, form in forms.items():
            one = evaluate(form, length, costs["chunk"], len(shapes))
            batch = 1 if name == "weight_bytes" else 6  # each weight once, all else for every sequence
            expected = [float(getattr(work(shape, length, 6, width, width), name)) for shape in shapes]
            np.testing.assert_allclose(batch * one, expected, rtol=1e-9, err_msg=f"{phase} {name} {length}")


def test_training_and_memory(counted):
    shapes, costs = counted
    np.testing.assert_array_equal(unpack(costs["num_params"]), [count_params(shape) for shape in shapes])
    for length in LENGTHS[1:]:
        expected = [count_flops(shape, length).forward_backward / length for shape in shapes]
        np.testing.assert_allclose(evaluate(costs["train"], length, costs["chunk"], len(shapes)), expected, rtol=1e-9)
    for prompt, generate, batch in ((3, 900, 7), (20000, 1, 1)):
        factors = dict(zip(MEMORY_TERMS, (1, batch, batch * prompt, batch * (prompt + generate))))
        for width in WIDTHS:
            memory = costs["widths"][str(width)]["memory"]
            found = sum(unpack(memory[name]) * factor for name, factor in factors.items())
            expected = [sum(serving_memory(s, prompt, generate, batch, width, width).values()) for s in shapes]
            np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_count_of_another_form_is_refused():
    with pytest.raises(PlanningError, match="attention of a new kind is no sum"):
        coefficients("attention of a new kind", lambda at: (at * np.log(at + 1))[None], (Form(("1", "T", "TT")),), 64)
