"""Checks of sampling: the distribution, reads by the host, graphs against eager steps, and speed."""

import warnings

import torch
from torch import Tensor

from common.generation.compiled import compiled_models
from common.generation.decoding import Responses, draw, sample_responses, uniforms_for
from common.model.forward import label_pass
from common.model.head import Targets
from tests.gpu.setting import GIB, Outcome, Setting

TOP_K, TOP_P = 50, 0.9
MOST_READS = 1 / 8  # of the device by the host, per token
LARGEST_GAP = 0.05  # mean difference of sampler and trainer in bf16, nats per token
LEAST_TOKENS = 4000  # per second, of a 7B model with graphs and 64 rows
RESERVED = 1.3  # most reserved memory, relative to tensors
OF_LAYER, BESIDES = 43, 65  # most kernels of a decoding step: of a layer, and others


def draws(setting: Setting) -> Outcome:
    """Frequencies of top-k and top-p; a row alone and rows of a batch; the same numbers twice."""
    vocabulary, calls = (500, 50) if setting.is_cpu else (32_000, 2000)
    logits = 4 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    figures, passed = [], True
    for name, top_p, top_k in (("top-k", 1.0, TOP_K), ("top-p", TOP_P, 0)):
        expected = probabilities(logits.double(), top_p, top_k).to(setting.device)
        for rows, times in ((64, 1), (1, 5)):
            uniforms = uniforms_for(0, 1, range(times * calls), rows).to(setting.device)
            first, again = (drawn(logits.to(setting.device), uniforms, top_p, top_k) for _ in range(2))
            counts = first.flatten().bincount(minlength=vocabulary)
            outside = int(counts[expected == 0].sum())
            score = surprise(counts, first.numel() * expected)
            passed &= outside == 0 and abs(score) < 5 and torch.equal(first, again)
            figures.append(f"{name}, {rows} at once: {outside} outside, chi-square {score:+.1f} deviations")
    return Outcome(passed, "; ".join(figures))


def probabilities(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Of top-k or top-p sampling from logits (V,), on the host in fp64."""
    ordered, order = logits.softmax(0).sort(descending=True)
    count = top_k or int((ordered.cumsum(0) - ordered < top_p).sum())
    chosen = torch.zeros_like(logits)
    chosen[order[:count]] = ordered[:count] / ordered[:count].sum()
    return chosen


def drawn(logits: Tensor, uniforms: Tensor, top_p: float, top_k: int) -> Tensor:
    """Tokens (C, B) of C calls with B rows each."""
    rows = logits.expand(uniforms.shape[1], -1)
    return torch.stack([draw(rows, numbers, 1.0, top_p, top_k)[0] for numbers in uniforms])


def surprise(counts: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square of counts (V,), in standard deviations from its mean.

    Its variance for k tokens and n draws is 2 (k - 1) + (sum of 1 / p - k^2 - 2 k + 2) / n.
    """
    counts, expected = counts[expected > 0], expected[expected > 0]
    size, total = len(expected), expected.sum()
    variance = 2 * (size - 1) + ((total / expected).sum() - size**2 - 2 * size + 2) / total
    chi_square = ((counts - expected) ** 2 / expected).sum()
    return float((chi_square - (size - 1)) / variance.sqrt())


def reads(setting: Setting) -> Outcome:
    """How often the host waits for the device, per token of eager and of compiled steps."""
    model, figures, passed = setting.model("1B", layers=2), [], True
    for name, is_compiled in (("eager", False), ("graphs", True)):
        sample(setting, model, 40, is_compiled)
        counts = [count_reads(setting, model, length, is_compiled) for length in (8, 40)]
        per_token = (counts[1] - counts[0]) / 32
        passed &= per_token <= MOST_READS
        figures.append(f"{name} {per_token:g} per token")
    return Outcome(passed, "not counted: needs CUDA" if setting.is_cpu else ", ".join(figures))


def count_reads(setting: Setting, model: torch.nn.Module, length: int, is_compiled: bool) -> int:
    if setting.is_cpu:
        sample(setting, model, length, is_compiled)
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sample(setting, model, length, is_compiled)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def graphs(setting: Setting) -> Outcome:
    """Compiled steps pass their comparison with eager ones; both agree with the trainer in bf16."""
    model = setting.model("1B", layers=8)
    gaps = [gap(setting, model, sample(setting, model, 24, is_compiled)) for is_compiled in (False, True)]
    is_used = compiled_models.get(model, False)
    passed = is_used and max(gaps) <= LARGEST_GAP
    verdict = "compiled steps in use" if is_used else "compiled steps REFUSED, see the log"
    return Outcome(passed, f"{verdict}; gap to the trainer {gaps[0]:.2g} eager, {gaps[1]:.2g} compiled")


def rollout(setting: Setting) -> Outcome:
    """Speed of sampling with a 7B model, 64 rows of 256 + 128 tokens; reserved memory; the CUDA context."""
    model, figures, steps = setting.model("7B"), [], []
    short, long = (8, 24) if setting.is_cpu else (16, 128)
    for name, is_compiled in (("eager", False), ("graphs", True)):
        sample(setting, model, short, is_compiled)
        times = [
            setting.seconds(lambda n=n, c=is_compiled: sample(setting, model, n, c)) for n in (short, long)
        ]
        steps.append((times[1] - times[0]) / (long - short))
        tokens = len(prompts(setting)) / steps[-1]
        figures.append(f"{name} {1000 * steps[-1]:.1f} ms per token, {tokens:.0f} tokens/s")
    weights = sum(p.nbytes for p in model.parameters())
    speeds = {
        "memory_bandwidth": (weights + cache_bytes(setting, model)) / steps[1],
        "launch_seconds": steps[0] / (OF_LAYER * model.config.num_hidden_layers + BESIDES),
    }
    if setting.is_cpu:
        return Outcome(True, f"{'; '.join(figures)}; not judged: needs CUDA")
    reserved = torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated()
    free, card = torch.cuda.mem_get_info()
    context = (card - free - torch.cuda.memory_reserved()) / GIB
    figures.append(f"reserved / tensors {reserved:.2f}, context {context:.2f} GiB")
    return Outcome(tokens >= LEAST_TOKENS and reserved <= RESERVED, "; ".join(figures), speeds)


def cache_bytes(setting: Setting, model: torch.nn.Module) -> int:
    """Keys and values that a step reads after the prompts."""
    config = model.config
    tokens = sum(map(len, prompts(setting)))
    return 2 * config.num_hidden_layers * config.hidden_size * tokens * model.dtype.itemsize


def prompts(setting: Setting) -> list[list[int]]:
    """64 prompts of 225 to 256 tokens, of unlike length; few short ones on the CPU."""
    rows, longest = (4, 12) if setting.is_cpu else (64, 256)
    return [[*range(3, 3 + longest - row // 2)] for row in range(rows)][::-1]


def sample(setting: Setting, model: torch.nn.Module, length: int, is_compiled: bool) -> Responses:
    """Responses of full length to the prompts."""
    rows = prompts(setting)
    uniforms = uniforms_for(0, 1, range(len(rows)), length).to(setting.device)
    no_end = model.config.vocab_size
    return sample_responses(model, rows, uniforms, 1.0, 1.0, no_end, 0, False, compiled=is_compiled)


@torch.no_grad()
def gap(setting: Setting, model: torch.nn.Module, responses: Responses) -> float:
    """Mean |log-probability of the trainer's pass - of the sampler|, in nats per token."""
    gaps = []
    for prompt, ids, logprobs in zip(prompts(setting), responses.ids, responses.logprobs, strict=True):
        tokens = torch.cat([torch.tensor(prompt, device=ids.device), ids])[None]
        columns = torch.arange(len(prompt) - 1, tokens.shape[1] - 1, device=ids.device)
        trained = label_pass(model, tokens, (torch.zeros_like(columns), columns), Targets(ids)).logprobs
        gaps.append((trained - logprobs).abs().mean())
    return torch.stack(gaps).mean().item()
