"""A campaign of faults against a training run: python benchmarks/faults.py [--kills 60] [--seed 0]

A small run is trained once without a fault. Then again and again it is killed with SIGKILL at random moments and
started anew, with a checkpoint after every step, so that most kills fall near one and some into its write; some deaths
also tear the newest checkpoint, as a machine that loses power does. Every run ends in the weights and losses of the run
that had no fault, bit for bit. Further cases: SIGTERM, a full disk (a small tmpfs; left out, and said so, where none
can be mounted), losses that are not finite, a shard of tokens that is altered while the run reads it. The last line is
JSON.
"""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked: there may be no thread pool before

import torch

from xlstm_scaling import stages
from xlstm_scaling.corpus import CorpusError
from xlstm_scaling.models import LanguageModel
from xlstm_scaling.study.config import compose
from xlstm_scaling.study.errors import EXIT_PREEMPTED, Preempted
from xlstm_scaling.study.paths import StudyPaths
from xlstm_scaling.study.plan import Planner
from xlstm_scaling.training.checkpoint import load_file
from xlstm_scaling.training.execution import Execution
from xlstm_scaling.training.run import train

STEPS = 30
EXIT_DISK, EXIT_CORPUS = 3, 4
WORDS = ("the", "state", "of", "union", "is", "strong", "people", "nation", "war", "peace", "law", "money", "work")


class Campaign:
    """A run of one architecture, its fault-free result, and attempts at it in child processes."""

    def __init__(self, folder: Path, arch: str, seed: int) -> None:
        self.random = random.Random(f"{seed}{arch}")
        self.folder = folder / arch
        text = self.folder / "text"
        text.mkdir(parents=True)
        for number in range(40):
            (text / f"{number}.txt").write_text(" ".join(self.random.choices(WORDS, k=600)))
        overrides = ["study=smoke", "corpus=folder", f"corpus.path={text}", "corpus.validation_fraction=0.1"]
        overrides += ["tokenizer.vocab_size=280", "training.validation.max_tokens=2048"]
        config = compose([*overrides, "training.compute_dtype=float32"])
        paths = StudyPaths.of(config, self.folder / "results")
        stages.tokens(config, paths, progress=False)
        self.tokens = paths.tokens
        planner = Planner(config)
        self.spec = planner.run(planner.shape(arch, 32, 2, 1), 64, 4, STEPS, 1e-2)
        self.execution = Execution(progress=False, checkpoint_interval_s=0.0)
        self.lives = 0
        self.reference = self.folder / "reference"
        began = time.monotonic()
        if self.wait(self.start(self.reference)) != 0:
            raise SystemExit("the run without faults failed")
        self.seconds = time.monotonic() - began

    def start(self, run: Path, before=lambda: None, **execution) -> int:
        """Fork a child that trains in ``run`` -> its process id."""
        child = os.fork()
        if child:
            self.lives += 1
            return child
        status = 1
        try:
            with Path(f"{run}.log").open("a") as log:
                os.dup2(log.fileno(), 2)
                before()
                train(self.spec, self.tokens, run, replace(self.execution, **execution))
                status = 0
        except Preempted:
            status = EXIT_PREEMPTED
        except CorpusError as error:
            print(error, file=sys.stderr)
            status = EXIT_CORPUS
        except OSError as error:
            print(error, file=sys.stderr)
            status = EXIT_DISK if "disk full" in str(error) else 1
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(status)

    def wait(self, child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def ended(self, child: int) -> bool:
        """Whether the child has ended; it is still to be waited for."""
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def same(self, run: Path, curve: bool = True) -> bool:
        """Whether a run ended with the bits of the reference, its training curve too."""
        mine, other = (load_file(path / "final.ckpt") for path in (run, self.reference))
        curves = [
            [(line["step"], line["train_loss"], line["val_loss"]) for line in map(json.loads, text.splitlines())]
            for text in ((path / "history.jsonl").read_text() for path in (run, self.reference))
        ]
        weights = all(torch.equal(mine["model"][name], value) for name, value in other["model"].items())
        losses = mine["result"]["val_loss"] == other["result"]["val_loss"]
        return weights and losses and (not curve or curves[0] == curves[1])

    def newest(self, run: Path) -> Path | None:
        found = sorted((run / "checkpoints").glob("step-*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))
        return found[-1] if found else None

    def killed(self, run: Path, moment: str) -> bool:
        """Start the run and kill it: at a random time, or while it writes a checkpoint -> whether it was killed."""
        child = self.start(run)
        if moment == "write":
            # some writes into the run, then the next temporary file
            skip, seen = self.random.randrange(30), set()
            while not self.ended(child):
                with contextlib.suppress(FileNotFoundError):
                    seen |= {path.name for path in (run / "checkpoints").glob(".step-*.tmp")}
                if len(seen) > skip:
                    break
        else:
            end = time.monotonic() + self.random.uniform(0.0, 0.7 * self.seconds)
            while time.monotonic() < end and not self.ended(child):
                time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return self.wait(child) == -signal.SIGKILL

    def kills(self, count: int) -> dict:
        """Kill runs ``count`` times; each run is started until it ends."""
        done = {"random": 0, "write": 0, "left a partial write": 0, "torn checkpoints": 0}
        runs = equal = 0
        while done["random"] + done["write"] < count:
            run = self.folder / f"killed-{runs}"
            lives = 0
            while not (run / "result.json").exists() and lives < 8:
                lives += 1
                moment = self.random.choice(["random", "random", "write"])
                if not self.killed(run, moment):
                    continue
                done[moment] += 1
                done["left a partial write"] += any((run / "checkpoints").glob(".*.tmp"))
                newest = self.newest(run)
                if newest is not None and self.random.random() < 0.25:
                    content = newest.read_bytes()
                    newest.write_bytes(content[: self.random.randrange(len(content))])
                    done["torn checkpoints"] += 1
            if not (run / "result.json").exists() and self.wait(self.start(run)) != 0:
                raise SystemExit(f"a killed run could not go on:\n{Path(f'{run}.log').read_text()}")
            runs += 1
            equal += self.same(run)
        return done | {"runs": runs, "runs with the bits of the run without faults": equal}

    def terminated(self, count: int) -> dict:
        """SIGTERM at random moments: saved, the status that the workflow knows, and on from that very step."""
        run, saved, lost, asked = self.folder / "terminated", 0, 0, 0
        while asked < count and not (run / "result.json").exists():
            (run / "history.jsonl").unlink(missing_ok=True)  # made anew when training begins
            child = self.start(run, checkpoint_interval_s=1e9)
            while not (run / "history.jsonl").exists() and not self.ended(child):
                time.sleep(0.001)
            time.sleep(self.random.uniform(0.0, 0.1) * self.seconds)
            if self.ended(child):
                self.wait(child)
                break
            os.kill(child, signal.SIGTERM)
            asked += 1
            status = self.wait(child)
            saved += status == EXIT_PREEMPTED
            lost += status not in (0, EXIT_PREEMPTED, -signal.SIGTERM)
        while not (run / "result.json").exists():
            self.wait(self.start(run))
        weights = self.same(run, curve=False)
        return {"asked": asked, "saved": saved, "failed": lost, "same": weights}

    def not_finite(self) -> dict:
        """Losses that are NaN: a few are skipped; many in a row end the run as diverged."""
        original = LanguageModel.loss

        def poison(steps):
            calls = iter(range(10**9))

            def poisoned(model, *args):
                loss = original(model, *args)
                return loss * math.nan if torch.is_grad_enabled() and next(calls) in steps else loss

            LanguageModel.loss = poisoned

        results = {}
        for name, steps in (("few", {3, 11, 12}), ("many", range(5, 1000))):
            run = self.folder / f"nan-{name}"
            self.wait(self.start(run, before=lambda steps=steps: poison(steps)))
            results[name] = json.loads((run / "result.json").read_text())
        weights = load_file(self.folder / "nan-few" / "final.ckpt")["model"].values()
        return {
            "few": results["few"]["status"], "few_skipped": results["few"]["skipped_steps"],
            "few_weights_finite": all(bool(torch.isfinite(weight).all()) for weight in weights),
            "many": results["many"]["status"],
        }  # fmt: skip

    def altered_shard(self) -> dict:
        """A byte of a shard changes under a running job: an error that names it; the right result once it is back."""
        run, shard = self.folder / "altered", next(self.tokens.glob("train-*.bin"))
        content = shard.read_bytes()
        child = self.start(run)
        while self.newest(run) is None and not self.ended(child):
            time.sleep(0.001)
        with shard.open("r+b") as stream:
            stream.seek(len(content) // 2)
            stream.write(bytes([content[len(content) // 2] ^ 1]))
        status = self.wait(child)
        again = self.wait(self.start(run))
        named = shard.name in Path(f"{run}.log").read_text()
        shard.write_bytes(content)
        healed = self.wait(self.start(run))
        return {
            "refused": status == EXIT_CORPUS, "refused_again": again == EXIT_CORPUS, "named": named,
            "same_after_repair": healed == 0 and self.same(run),
        }  # fmt: skip

    def full_disk(self) -> dict:
        """A tmpfs with room for less than the run's files; then with room."""
        mount = self.folder / "disk"
        mount.mkdir()
        size = 3 * (self.reference / "final.ckpt").stat().st_size
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={4 * size}", "tmpfs", str(mount)], capture_output=True, text=True
        )
        if done.returncode:
            return {"skipped": f"no tmpfs can be mounted: {done.stderr.strip()}"}
        try:
            run, filler = mount / "run", mount / "filler"
            child = self.start(run)
            while self.newest(run) is None and not self.ended(child):
                time.sleep(0.001)
            with filler.open("wb", buffering=0) as stream:
                while not self.ended(child):  # what an old checkpoint leaves is taken at once
                    try:
                        stream.write(bytes(1 << 14))
                    except OSError:
                        time.sleep(0.0005)
            status = self.wait(child)
            kept = self.newest(run)
            intact = kept is not None and bool(load_file(kept))
            while (written := filler.stat().st_size) and self.wait(self.start(run)) == EXIT_DISK:
                os.truncate(filler, max(0, written - size))
            return {"refused": status == EXIT_DISK, "checkpoint_kept": intact, "same_after_room": self.same(run)}
        finally:
            subprocess.run(["umount", "-l", str(mount)], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs, over all architectures (default: 60)")
    parser.add_argument("--arch", nargs="+", default=["xlstm", "transformer"], choices=["xlstm", "transformer"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imported once, not by every child
    began = time.monotonic()
    cases, passed = {}, True
    with tempfile.TemporaryDirectory() as folder:
        for arch in args.arch:
            campaign = Campaign(Path(folder), arch, args.seed)
            found = {
                "SIGKILL": campaign.kills(math.ceil(args.kills / len(args.arch))),
                "SIGTERM": campaign.terminated(3),
                "not finite": campaign.not_finite(),
                "altered shard": campaign.altered_shard(),
                "full disk": campaign.full_disk(),
            }
            kills, disk = found["SIGKILL"], found["full disk"]
            passed &= kills["runs"] == kills["runs with the bits of the run without faults"]
            passed &= found["SIGTERM"]["same"] and found["SIGTERM"]["saved"] > 0 and not found["SIGTERM"]["failed"]
            passed &= found["not finite"] == {
                "few": "ok", "few_skipped": 3, "few_weights_finite": True, "many": "diverged"
            }  # fmt: skip
            passed &= all(found["altered shard"].values())
            passed &= "skipped" in disk or all(disk.values())
            cases[arch] = found | {"processes": campaign.lives, "run_s": round(campaign.seconds, 2)}
            print(arch, json.dumps(cases[arch], indent=1), flush=True)
    print(json.dumps({"pass": bool(passed), "seconds": round(time.monotonic() - began, 1), "cases": cases}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
