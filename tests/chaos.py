"""Kill a stage again and again at random moments, resume it, and compare its end with an undisturbed run.

    python -m tests.chaos --kills 50

For each stage: runs through the launch script on two ranks, a checkpoint every few steps. SIGKILL hits a
rank, the launcher, the `deepspeed` command, the launch script, or all of them, while models load, while a
step runs or while a checkpoint is written. A run that comes to its end must have the bytes and the metrics of
the undisturbed one, and every start must go on from the newest checkpoint that was complete when it was
killed.
"""

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from common.training.checkpoint import list_checkpoints
from tests.end_to_end.test_resume import assert_same_end, steps_of
from tests.stages import make_world, ppo, reward, sft

ROOT = Path(__file__).resolve().parents[1]

TARGETS = ("rank", "launcher", "deepspeed", "script", "everything")
SCRIPTS = {"sft": "step1_sft.sh", "reward": "step2_reward.sh", "ppo": "step3_ppo.sh"}
STEPS = {"sft": 200, "reward": 200, "ppo": 40}
SAVE_STEPS = {"sft": 10, "reward": 10, "ppo": 2}


def start(stage: str, words: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / SCRIPTS[stage]), *words], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "NUM_GPUS": "2"}, start_new_session=True,
    )  # fmt: skip


def strike(script: subprocess.Popen, target: str, dice: random.Random) -> str:
    """Kill the target; what was hit, or nothing when it was not there."""
    try:
        process = psutil.Process(script.pid)
        below = process.children(recursive=True)
        named = {"script": [process], "everything": [process, *below]}
        named["deepspeed"] = process.children()
        named["launcher"] = [p for p in below if "deepspeed.launcher.launch" in p.cmdline()]
        named["rank"] = [p for launcher in named["launcher"] for p in launcher.children()]
        chosen = (
            named[target]
            if target == "everything"
            else dice.sample(named[target], min(1, len(named[target])))
        )
        for victim in chosen:
            victim.kill()
    except psutil.NoSuchProcess:
        return ""
    return target if chosen else ""


def wait_until_gone(script: subprocess.Popen, output: Path) -> None:
    """Until the script and every rank of the run have ended; ranks that lost their launcher stop politely."""
    script.wait()
    deadline = time.monotonic() + 60
    while any(str(output) in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.1)


def one_life(stage: str, words: list[str], output: Path, dice: random.Random) -> str:
    """Start the stage and kill something after a random time; what was hit, or nothing if it ended before."""
    newest = (list_checkpoints(output) or [None])[-1]
    log = output / "train.log"
    seen = log.stat().st_size if log.exists() else 0
    script = start(stage, words)
    if dice.random() < 0.2:
        time.sleep(dice.uniform(0, 8))
    else:
        while script.poll() is None and not (log.exists() and b"\nstep " in log.read_bytes()[seen:]):
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 2))
    hit = strike(script, dice.choice(TARGETS), dice) if script.poll() is None else ""
    wait_until_gone(script, output)
    text = log.read_bytes()[seen:].decode() if log.exists() else ""
    if newest is not None and "\nstep " in text:
        assert f"resumed from {newest} " in text, f"did not go on from {newest}: {text[:500]}"
    assert "is damaged" not in text, text
    return hit


def torment(stage: str, world: Path, start_of: dict[str, Path], folder: Path, kills: int, seed: int) -> str:
    """Kill the stage so many times, in as many runs as it takes; a line of figures."""

    def words(output: Path) -> list[str]:
        steps = STEPS[stage]
        options = {
            "sft": lambda: sft(world, output, steps),
            "reward": lambda: reward(world, start_of["sft"], output, steps),
            "ppo": lambda: ppo(world, start_of["sft"], start_of["reward"], output, steps),
        }[stage]()
        zero = str(ROOT / f"common/zero_configs/zero{seed % 4}.json")
        return [*options, "--save_steps", str(SAVE_STEPS[stage]), "--zero_config", zero]

    dice = random.Random(f"{seed} {stage}")
    last = "final_critic" if stage == "ppo" else "final"
    full = folder / f"{stage}_undisturbed"
    assert start(stage, words(full)).wait() == 0
    hits: Counter[str] = Counter()
    runs = lives = 0
    while hits.total() < kills:
        runs += 1
        output = folder / f"{stage}_{runs}"
        while not (output / last).exists():
            lives += 1
            if hits.total() == kills:
                assert start(stage, words(output)).wait() == 0
            elif hit := one_life(stage, words(output), output, dice):
                hits[hit] += 1
        assert_same_end(full, output)
        assert steps_of(output)[-1] == STEPS[stage]
    result = ", ".join(f"{name} {count}" for name, count in sorted(hits.items()))
    return (
        f"{stage}: {hits.total()} kills ({result}) in {lives} lives of {runs} runs, all ended as undisturbed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="kills per stage")
    parser.add_argument("--stages", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument(
        "--seed", type=int, default=0, help="decides moments and victims; modulo 4 the ZeRO stage"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        world = make_world(folder / "world")
        start_of = {name: folder / f"{name}_start/final" for name in ("sft", "reward")}
        assert start("sft", sft(world, start_of["sft"].parent, 5)).wait() == 0
        assert start("reward", reward(world, start_of["sft"], start_of["reward"].parent, 5)).wait() == 0
        for stage in options.stages:
            begin = time.monotonic()
            line = torment(stage, world, start_of, folder, options.kills, options.seed)
            print(f"{line}, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
