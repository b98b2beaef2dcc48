"""Decoding against Hugging Face's models on a CPU: python benchmarks/decoding.py [--quick] [--size 512x8x8192 ...]

Ours and `transformers`' models of the same weights and shapes (xLSTMForCausalLM, LlamaForCausalLM with its KV cache)
read the same prompt and continue it greedily, a few tokens at a time in turn, in one process: medians over turns, so
that other load on the machine meets all alike. Rows: architecture x size (width x blocks x vocabulary) x batch. Per
row: the step time of our decoder, of our model without it and of theirs, the ratios by the clock and by CPU time, how
far logits are apart, and the roofline: bytes that a step must move (weights once, state or cache) over the bandwidth at
which torch sums as many bytes, and the share of it that the decoder reaches. The xLSTM's step times after prefills of
256 and 16,384 tokens are measured in turn as well. The last line is JSON.
"""

import argparse
import json
import time

import numpy as np
import torch

from xlstm_scaling.accounting import make_shape
from xlstm_scaling.inference.decoder import make_decoder
from xlstm_scaling.inference.timing import prepare
from xlstm_scaling.interop.configurations import export_configuration
from xlstm_scaling.interop.model_folder import ModelDescription
from xlstm_scaling.interop.weights import pieces, to_theirs
from xlstm_scaling.models import build_model

SIZES = ["256x6x4096", "512x8x8192", "1024x12x4096", "1024x12x32768"]
HEADS = 4
RATIO_TARGET, FLAT_TARGET = 3.0, 0.05


def peer_of(shape, model, options):
    """The model of `transformers` with the same weights."""
    import transformers

    exported = export_configuration(ModelDescription(shape, options))
    config = transformers.AutoConfig.for_model(
        exported.model_type, **exported.fields, vocab_size=shape.vocab_size, tie_word_embeddings=False,
        use_cache=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    peer.load_state_dict(to_theirs(pieces(shape), model.state_dict()))
    return peer.eval().requires_grad_(False)


class Peer:
    """Greedy decoding as `transformers`' generate does it: the last token through the model, with its cache."""

    def __init__(self, model, arch):
        self.model, self.name = model, "cache_params" if arch == "xlstm" else "past_key_values"

    def prefill(self, prompt):
        return self._forward(input_ids=prompt, use_cache=True)

    def step(self, token):
        return self._forward(input_ids=token[:, None], use_cache=True, **{self.name: self.cache})

    def _forward(self, **inputs):
        out = self.model(**inputs)
        self.cache = getattr(out, self.name)
        return out.logits[:, -1]


class Ours:
    """A decoder of ours; ``kind`` as in make_decoder."""

    def __init__(self, model, batch, length, kind):
        self.decoder = make_decoder(model, batch, length, kind)

    def prefill(self, prompt):
        logits, state = self.decoder.model.prefill(prompt, self.decoder.start())
        self.decoder.take(state)
        return logits

    def step(self, token):
        return self.decoder.step(token)


def in_turn(programs, tokens, turns, steps):
    """Seconds and CPU seconds of a step, by program: medians over turns after the first."""
    wall, cpu = {name: [] for name in programs}, {name: [] for name in programs}
    for _ in range(turns + 1):
        for name, program in programs.items():
            token = tokens[name]
            began, busy = time.perf_counter(), time.process_time()
            for _ in range(steps):
                token = program.step(token).argmax(-1)
            wall[name].append((time.perf_counter() - began) / steps)
            cpu[name].append((time.process_time() - busy) / steps)
            tokens[name] = token
    return [{name: float(np.median(values[1:])) for name, values in times.items()} for times in (wall, cpu)]


def bandwidth(num_bytes, repeats=9):
    """Bytes a second at which torch sums this many bytes of fp32."""
    x = torch.ones(max(1, int(num_bytes) // 4))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - began)
    return x.nbytes / float(np.median(times[1:]))


def step_bytes(model, batch, length):
    """Bytes that one step reads: matrices and norms once, rows of the embedding, the state (also written) or cache."""
    total = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embedding" not in n)
    state = model.init_state(batch, length)
    if model.shape.arch == "xlstm":
        return total + 2 * sum(x.nbytes for one in state for x in one)
    return total + sum(one.k.nbytes + one.v.nbytes for one in state)


def row(arch, size, batch, prefill, turns, steps, dtype, with_peer):
    d, blocks, vocab = map(int, size.split("x"))
    shape = make_shape(arch, d, blocks, HEADS, vocab)
    options = {} if arch == "xlstm" else {"logit_cap": None}  # Llama has none
    model = build_model(shape, seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():  # gates that pass something on
        if "output_gate" in name:
            p.data.normal_(std=d**-0.5, generator=generator)
        elif "gates.bias" in name:
            p.data[:HEADS] = -1.0
    peer = peer_of(shape, model, options) if with_peer else None
    model = prepare(model, getattr(torch, dtype))
    prompt = torch.randint(vocab, (batch, prefill), generator=generator)
    length = prefill + (turns + 2) * steps + 8
    programs = {"decoder": Ours(model, batch, length, "cpp"), "module": Ours(model, batch, length, "torch")}
    if with_peer:
        programs["transformers"] = Peer(peer, arch)
    first = {name: program.prefill(prompt) for name, program in programs.items()}
    tokens = {name: first["decoder"].argmax(-1) for name in programs}
    second = {name: program.step(tokens[name]).clone() for name, program in programs.items()}
    scale = second["decoder"].abs().max()
    apart = {name: float((x - second["decoder"]).abs().max() / scale) for name, x in second.items()}
    wall, cpu = in_turn(programs, tokens, turns, steps)
    needed = step_bytes(model, batch, prefill)
    rate = bandwidth(needed)
    result = {
        "arch": arch, "size": size, "batch": batch, "prefill": prefill, "dtype": dtype, "params": model.num_params(),
        "step_time_s": wall, "cpu_s": cpu, "tokens_per_s": {name: batch / t for name, t in wall.items()},
        "logits_apart": apart, "step_bytes": needed, "bandwidth_bytes_per_s": rate,
        "roofline_share": needed / rate / wall["decoder"],
    }  # fmt: skip
    for name in set(programs) - {"decoder"}:
        result[f"ratio_{name}"] = wall[name] / wall["decoder"]
        result[f"ratio_cpu_{name}"] = cpu[name] / cpu["decoder"]
    line, ratio = ", ".join(f"{n} {1e3 * t:.3g} ms" for n, t in wall.items()), result.get("ratio_transformers")
    print(
        f"{arch} {size} batch {batch} {dtype}: {line}; {ratio or float('nan'):.2f} times transformers, "
        f"{100 * result['roofline_share']:.0f} % of {rate / 1e9:.3g} GB/s",
        flush=True,
    )
    return result


def flatness(size, turns, steps, prefills=(256, 16384)):
    """Step times of one xLSTM after a short and a long prompt, in turn: two decoders on the same weights."""
    d, blocks, vocab = map(int, size.split("x"))
    model = prepare(build_model(make_shape("xlstm", d, blocks, HEADS, vocab), seed=0), torch.float32)
    prompt = torch.randint(vocab, (1, max(prefills)), generator=torch.Generator().manual_seed(2))
    programs, tokens = {}, {}
    for prefill in prefills:
        programs[prefill] = Ours(model, 1, prefill + (turns + 2) * steps, "cpp")
        tokens[prefill] = programs[prefill].prefill(prompt[:, :prefill]).argmax(-1)
    wall, _ = in_turn(programs, tokens, turns, steps)
    ratio = wall[prefills[1]] / wall[prefills[0]]
    print(f"xlstm {size}: step after {prefills[1]} tokens / after {prefills[0]}: {ratio:.3f}", flush=True)
    return {"size": size, "step_time_s": {str(k): v for k, v in wall.items()}, "ratio": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=SIZES, metavar="WIDTHxBLOCKSxVOCABULARY")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--arch", nargs="+", default=["xlstm", "transformer"])
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument(
        "--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"], help="of our matrices; theirs: fp32"
    )
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="tokens a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the first two sizes, 7 turns")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    turns, sizes = (7, args.size[:2]) if args.quick else (args.turns, args.size)
    with torch.inference_mode():
        rows = [
            row(arch, size, batch, args.prefill, turns, args.steps, dtype, not args.no_peer)
            for dtype in args.dtype
            for size in sizes
            for arch in args.arch
            for batch in args.batch
        ]
        flat = [flatness(size, turns, 4 * args.steps) for size in sizes[:2]] if "xlstm" in args.arch else []
    found = [
        (f"xlstm {r['size']} batch {r['batch']} {r['dtype']} against transformers", r["ratio_transformers"])
        for r in rows
        if r["arch"] == "xlstm" and not args.no_peer
    ]
    targets = [{"what": w, "value": x, "threshold": RATIO_TARGET, "pass": x >= RATIO_TARGET} for w, x in found]
    found = [(f"xlstm {f['size']} step time after 16,384 tokens against 256", f["ratio"]) for f in flat]
    targets += [{"what": w, "value": x, "threshold": 1 + FLAT_TARGET, "pass": x <= 1 + FLAT_TARGET} for w, x in found]
    print(json.dumps({"threads": args.threads, "targets": targets, "rows": rows, "flat": flat}))


if __name__ == "__main__":
    main()
