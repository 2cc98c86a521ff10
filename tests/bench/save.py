"""What saving a checkpoint needs beyond what is held already: seconds, host memory, disk.

    python tests/bench/save.py --zero_config common/zero_configs/zero2.json

One rank, a random Llama of 70M parameters in fp32 after one step of AdamW. Memory is resident: before the
save, and at its peak.
"""

import argparse
import gc
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.model.engine import backward_and_step, make_engine
from common.model.zero import load_zero_config
from common.runtime.distributed import init_distributed
from common.training.checkpoint import save_checkpoint
from common.training.train_state import TrainState
from step1_sft.options import SFTOptions

LLAMA = LlamaConfig(
    vocab_size=8192, hidden_size=640, intermediate_size=1720, num_hidden_layers=12, num_attention_heads=10
)


def resident_gib(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zero_config", default="common/zero_configs/zero2.json")
    zero_config = parser.parse_args().zero_config
    with tempfile.TemporaryDirectory() as folder:
        options = SFTOptions(output_dir=folder, global_batch_size=1, micro_batch_size=1)
        Path(folder, "checkpoints").mkdir()
        init_distributed()
        zero = load_zero_config(zero_config, options, options.learning_rate)
        engine = make_engine(LlamaForCausalLM(LLAMA), zero, options, options.learning_rate, 10)
        ids = torch.randint(LLAMA.vocab_size, (1, 16))
        backward_and_step(engine, engine(input_ids=ids, labels=ids).loss, 1, True)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of before
        before, start = resident_gib("VmRSS"), time.perf_counter()
        save_checkpoint(options, TrainState(step=1), {"policy": engine})
        seconds, peak = time.perf_counter() - start, resident_gib("VmHWM")
        sizes = [file.stat().st_size / 2**30 for file in Path(folder).rglob("*") if file.is_file()]
    print(
        f"{zero_config}: {seconds:.1f} s; resident {before:.2f} GiB before, {peak:.2f} GiB at most;"
        f" {sum(sizes):.2f} GiB on disk, {max(sizes):.2f} GiB in the largest file"
    )


if __name__ == "__main__":
    main()
