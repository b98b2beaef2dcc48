"""Fixtures that several folders share."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels are interpreted; read when Triton is imported


torch.set_num_threads(1)  # what the variable is read for was imported above

#: files that take more than ten seconds -> CPU seconds with their child processes, for their order alone
LONG = {
    "workflow/test_workflow.py": 120,
    "workflow/test_published.py": 65,
    "training/test_parallel.py": 55,
    "kernels/test_compilation.py": 45,
    "kernels/test_mlstm_triton.py": 32,
    "figures/test_figures_draw.py": 28,
    "fitting/test_fit_loss_surface.py": 28,
    "fitting/test_runtime_model.py": 25,
    "kernels/test_training_curves.py": 24,
    "training/test_faults.py": 22,
    "kernels/test_certification.py": 20,
    "training/test_trainer.py": 20,
    "workflow/test_certificate.py": 20,
    "fitting/test_fit_study.py": 15,
    "inference/test_decoder.py": 15,
    "kernels/test_mlstm_cpu.py": 13,
    "study/test_stages.py": 12,
    "inference/test_generation.py": 11,
    "accounting/test_memory.py": 11,
    "published/test_paper.py": 11,
    "published/test_claims_paper.py": 11,
    "published/test_ingest.py": 10,
}


def pytest_configure(config: pytest.Config) -> None:
    """xdist would begin with the files of the most tests, which leaves the longest ones to the end."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that they do not run alone at the end where files are spread over processes."""
    tests = Path(__file__).parent
    items.sort(key=lambda item: -LONG.get(item.path.relative_to(tests).as_posix(), 0))


@pytest.fixture(scope="session")
def paper() -> Path:
    """The folder of the paper's published evidence: $XLSTM_SCALING_PAPER, or ``shared/paper`` beside the repository."""
    folder = Path(os.environ.get("XLSTM_SCALING_PAPER", REPOSITORY.parent / "shared" / "paper"))
    for name in ("runs.csv", "inference.csv"):
        if not (folder / name).is_file():
            pytest.skip(f"the paper's {name} is not in {folder} (XLSTM_SCALING_PAPER)")
    return folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all processes of this call of pytest share: what is made there is made under a lock."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def quick_certificate(shared_folder) -> Path:
    """The certificate of this CPU's kernels as studies make it; half a minute, so once for all processes."""
    from filelock import FileLock

    from xlstm_scaling.cli import run_command

    path = shared_folder / "quick-certificate.json"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            words = ["certify", "--device", "cpu", "--quick", "--report-only", "--quiet", "--out", str(path)]
            assert run_command(words) == 0
    return path


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A small folder of text: sentences drawn from a Markov chain over words, 60 documents."""
    import random

    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    words = [
        "the",
        "state",
        "of",
        "union",
        "is",
        "strong",
        "people",
        "nation",
        "war",
        "peace",
        "law",
        "money",
        "work",
        "land",
        "river",
        "trade",
        "tax",
        "court",
    ]
    for number in range(60):
        length = generator.randint(300, 900)
        word, text = generator.choice(words), []
        for _ in range(length):
            index = words.index(word)
            word = words[(index * 3 + generator.choice([0, 1, 1, 5])) % len(words)]
            text.append(word)
        (folder / f"{number:03d}.txt").write_text(" ".join(text) + ".\n")
    return folder


TINY_STUDY = """
# @package _global_
defaults:
  - without_grid
  - override /corpus: folder
  - _self_
corpus: {validation_fraction: 0.1}
tokenizer: {vocab_size: 280}
inference: {num_threads: 1, repeats: 1, max_cell_s: 0.5, runtime_model: {num_resamples: 10}}
fitting: {num_resamples: 50}
figures: {dpi: 60}
training:
  compute_dtype: float32
  min_steps: 2
  validation: {max_tokens: 2048}
  batch: {base_tokens: 128, flops_exponent: 0.0}
study:
  name: tiny
  base_context: 32
  sizes:
    tiny: {embedding_dim: 16, num_blocks: 1}
    small: {embedding_dim: 24, num_blocks: 1}
    mid: {embedding_dim: 32, num_blocks: 1}
    big: {embedding_dim: 32, num_blocks: 2}
  isoflop:
    c32: {context_length: 32, budget_flops: 4.0e+8, sizes: [tiny, small, mid, big]}
"""


@pytest.fixture(scope="session")
def tiny_overrides(text_folder, tmp_path_factory) -> list[str]:
    """A study of seconds on that text, in a configuration folder of its own."""
    import shutil

    folder = tmp_path_factory.mktemp("configuration") / "conf"
    shutil.copytree(REPOSITORY / "conf", folder)
    smoke = (folder / "study" / "smoke.yaml").read_text()
    # Hydra merges mappings: the tiny study starts from smoke without its grid
    (folder / "study" / "without_grid.yaml").write_text(smoke[: smoke.index("  sizes:")])
    (folder / "study" / "tiny.yaml").write_text(TINY_STUDY.lstrip())
    previous = os.environ.get("XLSTM_SCALING_CONF")
    os.environ["XLSTM_SCALING_CONF"] = str(folder)
    yield ["study=tiny", f"corpus.path={text_folder}"]
    if previous is None:
        del os.environ["XLSTM_SCALING_CONF"]
    else:
        os.environ["XLSTM_SCALING_CONF"] = previous


@pytest.fixture(scope="session")
def tiny_config(tiny_overrides):
    from xlstm_scaling.study.config import compose

    return compose(tiny_overrides)


@pytest.fixture(scope="session")
def tiny_tokens(tiny_config, tmp_path_factory) -> Path:
    """A results folder that holds the tokens of ``tiny_config``."""
    from xlstm_scaling import stages
    from xlstm_scaling.study.paths import StudyPaths

    results = tmp_path_factory.mktemp("results")
    stages.tokens(tiny_config, StudyPaths.of(tiny_config, results), progress=False)
    return results
