"""Small logs in the form of the paper's, and the paper's own where they are at hand."""

import sys
import types
from pathlib import Path

import pytest
from logged import MODULE, dumps, series

from xlstm_scaling.accounting import count_params, make_shape

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 256


@pytest.fixture
def run_class(monkeypatch):
    """The class of logged runs under the authors' module name, for as long as a test pickles."""
    cls = type("WandBRunData", (), {"__module__": MODULE})
    parts = MODULE.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules[MODULE].WandBRunData = cls
    return cls


@pytest.fixture
def make_run(run_class):
    """A maker of logged runs; what is None is not logged."""

    def make(
        name="dclm_mLSTMv1_ctx128_gbs4", run_id="abc", arch="xlstm", dim=64, blocks=2, heads=2, context=128, batch=4,
        steps=100, losses=(5.0, 3.0), created_at="2025-04-12T02:00:05Z", first_step=50, logged=True, **changes,
    ):  # fmt: skip
        shape = make_shape(arch, dim, blocks, heads, VOCAB)
        config = {
            "model.model_config.num_blocks": blocks,
            "model.model_config.embedding_dim": dim,
            "model.model_config.vocab_size": VOCAB,
            "model.model_config.dtype": "bfloat16",
            "trainer.seed": 0,
            "optimizer.scheduler": "{'lr': 0.003, 'end_lr': None, 'warmup_steps': 7, 'cooldown_lr': 0.0}",
        }
        if arch == "xlstm":
            mlstm = "model.model_config.mlstm_block.mlstm."
            config |= {
                "model.model_class": "somewhere.xLSTMLMModel",
                "model.model_config.context_length": context,
                mlstm + "num_heads": heads,
                mlstm + "qk_dim_factor": 0.5,
                mlstm + "layer_type": "mlstm_v1",
                mlstm + "mlstm_cell.backend.kwargs": "{'chunk_size': 64, 'eps': 1e-06}",
            }
        else:
            config |= {
                "model.model_class": "somewhere.LlamaTransformer",
                "model.model_config.head_dim": dim // heads,
            }
        run = run_class()
        at = [first_step + 50 * place for place in range(len(losses))]
        summary = {
            "dataset/": {"global_batch_size": batch, "num_train_steps": steps},
            "model/": {"num_params": count_params(shape)},
        }
        logs = {
            "val/.dclm_loss": series("val/.dclm_loss", at, losses),
            "train/.loss_mean": series("train/.loss_mean", at, [loss + 0.5 for loss in losses]),
            "train/.step_time": series("train/.step_time", at, [0.25] * len(losses)),
            "train/.optimizer/lr": series("train/.optimizer/lr", at, [0.001] * len(losses)),
        }
        run.__dict__ |= {
            "name": name, "id": run_id, "path": ["team", "project", run_id], "created_at": created_at,
            "config": config, "metadata": {"os": "Linux"}, "summary": summary if logged else {},
            "logs": logs if logged else {}, "step_key": "_step",
        }  # fmt: skip
        run.__dict__ |= changes
        return run

    return make


@pytest.fixture
def write_log(tmp_path):
    """Write {tag: [run, …]} under the name of one of the paper's logs; returns the file."""

    def write(groups, name="isoflop_mlstm_ctx16384_wandb_data.pkl", folder=tmp_path):
        folder.mkdir(exist_ok=True)
        path = folder / name
        path.write_bytes(dumps(groups))
        return path

    return write
