"""A published folder of planted runs: two laws, IsoFLOP and token/param sets, a few inference measurements."""

import numpy as np
import pandas as pd

from xlstm_scaling.accounting import count_params, make_shape, training_flops

LAWS = {"xlstm": (1.69, 380.0, 0.34, 400.0, 0.28), "llama": (1.69, 406.0, 0.34, 420.0, 0.28)}
TAGS = {"xlstm": "scl_mlstm_160Mv2", "llama": "scl_llama_160M"}
CONTEXT, VOCAB = 2048, 1000
SHAPES = [(512, 10), (640, 14), (768, 16), (1024, 18), (1280, 24), (1536, 30)]


def _run(arch, kind, dim, blocks, tokens, tag, rng):
    shape = make_shape("transformer" if arch == "llama" else arch, dim, blocks, 4, VOCAB, 64)
    batch = 8
    steps = max(1, round(tokens / (batch * CONTEXT)))
    num_params, num_tokens = count_params(shape), batch * CONTEXT * steps
    e, a, alpha, b, beta = LAWS[arch]
    loss = (e + a / num_params**alpha + b / num_tokens**beta) * np.exp(0.002 * rng.normal())
    return {
        **{"arch": arch, "experiment_set": kind, "context_length": CONTEXT, "run_tag": TAGS[arch]},
        "isoflop_tag": tag if kind == "isoflop" else np.nan,
        **{"num_params": num_params, "num_tokens": num_tokens, "val_loss": loss, "train_loss": loss - 0.01},
        "num_flops": training_flops(shape, CONTEXT, batch, steps),
        **{"embedding_dim": dim, "num_blocks": blocks, "num_heads": 4, "vocab_size": VOCAB, "chunk_size": 64},
        **{"head_dim_v": shape.head_dim_v, "head_dim_qk": shape.head_dim_qk, "ffn_dim": shape.ffn_dim},
        **{"global_batch_size_sequences": batch, "num_train_steps": steps, "learning_rate": 1e-3},
        **{"in_paper_640": True, "notebook_multiplicity": 1, "val_loss_abs_err": 0.0},
        **{"name": f"{arch}-{dim}-{steps}", "run_id": f"{kind}{arch}{dim}x{steps}", "dataset": f"{kind}_{arch}"},
    }


def planted_runs():
    """The table of runs as a CSV of the kind of the paper's."""
    rng, rows = np.random.default_rng(0), []
    for arch in LAWS:
        shapes = {
            dim: make_shape("transformer" if arch == "llama" else arch, dim, n, 4, VOCAB, 64) for dim, n in SHAPES
        }
        for budget in (6e18, 1e19, 3e19):
            for dim, blocks in SHAPES:
                tokens = budget / (training_flops(shapes[dim], CONTEXT, 1, 1) / CONTEXT)
                rows.append(_run(arch, "isoflop", dim, blocks, tokens, budget, rng))
        for ratio in (22, 220):
            for dim, blocks in SHAPES[:4]:
                rows.append(_run(arch, "tokenparam", dim, blocks, ratio * count_params(shapes[dim]), None, rng))
    return pd.DataFrame(rows)


def planted_measurements():
    """Inference measurements with the columns of the paper's CSV."""
    rows = []
    for kind in ("xlstm", "llama2", "llama3"):
        for dim, blocks in SHAPES[:3]:
            shape = make_shape("xlstm" if kind == "xlstm" else "transformer", dim, blocks, 4, VOCAB, 64)
            known = kind != "llama3"
            for batch in (1, 4):
                for prefill in (0, 256, 1024, 4096):
                    size, lost = count_params(shape), kind == "llama2" and batch == 4 and prefill == 4096
                    rows.append(
                        {
                            **{"model_type": kind, "model_tag": f"{kind}_{dim}", "num_params": size},
                            **{"batch_size": batch, "prefill_length_tokens": prefill},
                            "ttft_s": np.nan if lost else 1e-3 + 2e-13 * size * batch * max(prefill, 1),
                            "step_time_s": np.nan if lost else 1e-3 + 1e-12 * size + 1e-8 * prefill,
                            **{"memory_reserved_gen1_bytes": -1 if lost else 1e9, "num_heads": 4 if known else np.nan},
                            **{"embedding_dim": dim if known else np.nan, "num_blocks": blocks if known else np.nan},
                            **{
                                "ffn_dim": shape.ffn_dim,
                                "vocab_size": VOCAB,
                                "qk_dim_factor": 0.5 if kind == "xlstm" else np.nan,
                            },
                            **{"chunk_size": 64 if kind == "xlstm" else np.nan, "source": "planted"},
                            **{"used_in_paper_fit": known, "ttft_raw_pickle_s": np.nan},
                        }
                    )
    return pd.DataFrame(rows)
