"""Training waits for the certificate of its kernels, in a copy of the repository whose kernels can be changed."""

import json
import os
import re
import shutil

import pytest
from calls import REPOSITORY, planned, session, snakemake

#: in place of the certification, which takes seconds: every kernel passes, or is refused with these words
CERTIFY_AT_ONCE = """

def run_certify(args):
    import os

    from xlstm_scaling.kernels import registry
    from xlstm_scaling.kernels.certification import certificate
    from xlstm_scaling.study.files import write_json_atomic

    failures = [text for text in [os.environ.get("TEST_FAILURE")] if text]
    verdict = {"dtype": "float32", "passed": not failures, "failures": failures}
    kernels = [
        {"op": kernel.op, "form": kernel.form, "backend": kernel.backend, **verdict}
        for op, backend in registry._MODULES
        if backend != "triton"
        for kernel in registry.kernels(op, backend)
    ]
    content = {
        "schema_version": certificate.SCHEMA_VERSION,
        "device": certificate.describe_device("cpu"),
        "versions": certificate.versions(),
        "interpreted": False,
        "kernel_sources": certificate.source_digest(),
        "kernels": kernels,
    }
    write_json_atomic(args.out, content)
    return 0
"""


@pytest.mark.slow
def test_training_waits_for_the_certificate_and_heeds_it(tiny_overrides, text_folder, tmp_path):
    """In a copy of the repository, whose kernels can be changed."""
    copy = tmp_path / "copy"
    for name in ("src", "workflow"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("Snakefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, copy)
    (copy / "profiles").symlink_to("workflow/profiles")
    package = tmp_path / "path" / "xlstm_scaling"
    package.parent.mkdir()
    package.symlink_to(copy / "src")
    with (copy / "src" / "kernels" / "certification" / "command.py").open("a") as stream:
        stream.write(CERTIFY_AT_ONCE)
    words = ["--config", "study=tiny", f"overrides=[corpus.path={text_folder}]"]

    def run(*targets, check=True, **variables):
        return snakemake(
            *targets, *words, cwd=tmp_path, conf=os.environ["XLSTM_SCALING_CONF"], check=check, repository=copy,
            PYTHONPATH=str(package.parent), **session(), **variables,
        )  # fmt: skip

    text = run("-n", "train")
    runs = sorted(set(re.findall(r"training (xlstm\S+)", text)))
    assert planned(text)["certify"] == 1
    assert len(runs) == 4
    first, second = (f"results/runs/{name}/result.json" for name in runs[:2])
    run(first)
    certificate = tmp_path / "results" / "certificates" / "auto.json"
    assert certificate.exists()
    assert json.loads((tmp_path / first).read_text())["kernel_certificate"]
    assert "Nothing to be done" in run("-n", first)

    kernel = copy / "src" / "kernels" / "mlstm" / "chunkwise.py"
    kernel.write_text(kernel.read_text() + "# changed\n")
    jobs = planned(run("-n", first))
    assert jobs == {"certify": 1}
    text = run(first, second, check=False, TEST_FAILURE="dq is off by 1.0 in case 'odd length'")
    assert "failed its certification and is refused: dq is off by 1.0 in case 'odd length'" in text
    assert "runs that failed or were stopped: 1\n" in text
    assert f"{runs[1]}.log ends with" in text
    assert "xlstm-scaling report --results results study=tiny" in text
    assert not (tmp_path / second).exists()
    assert (tmp_path / first).exists()
    # as the message says: mended, certified, trained
    kernel.write_text(kernel.read_text() + "# mended\n")
    run(second)
    assert (tmp_path / second).exists()
