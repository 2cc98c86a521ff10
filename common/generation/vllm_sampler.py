"""Sample responses with vLLM, in the ranks' own processes, from the current weights of a policy."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.generation.decoding import Responses
from common.generation.options import GenerationOptions
from common.generation.vllm_internals import own_state, start_engine
from common.model.deepspeed_internals import is_partitioned
from common.model.families import head_size
from common.model.forward import base_model
from common.model.lora import is_mergeable, merged_weight
from common.runtime.distributed import device, gather_objects, is_lost_contact, on_cpu, rank
from common.runtime.options import UserError, reason

BLOCK = 128  # tokens of a block of keys and values in the CPU build; GPUs have smaller ones

Request = tuple[int, list[int]]  # row number and prompt


class VllmSampler:
    """Samples from a policy with vLLM's kernels, cache and scheduler.

    A group of --rollout_tensor_parallel ranks holds one copy of the weights. Tokens depend on seed, step, row
    and weights, not on the other rows or on earlier calls.
    """

    def __init__(self, policy: Any, path: str, options: GenerationOptions, longest: int) -> None:
        """Start the engine, with random weights. path: model folder with the configuration of the policy.
        longest: most tokens of a prompt and its response.

        Every rank must call it. Raises UserError when vLLM does not start.
        """
        model, ranks = base_model(policy), options.rollout_tensor_parallel
        self._policy, self._group_size = policy, ranks
        self._end_ids = model.end_ids
        dtype = next(model.parameters()).dtype
        try:
            self._engine = start_engine(
                model=path,
                dtype=str(dtype).removeprefix("torch."),
                hf_overrides={"vocab_size": model.num_tokens},
                load_format="dummy",
                skip_tokenizer_init=True,
                model_impl="vllm",
                generation_config="vllm",  # the model's own penalties would change the distribution
                logprobs_mode="processed_logprobs",
                max_model_len=longest,
                max_num_seqs=options.generation_batch_size,
                kv_cache_memory_bytes=cache_bytes(model.config, dtype, options, longest),
                gpu_memory_utilization=0.01,  # must be free at the start, beside the models in training
                enforce_eager=on_cpu(),
                enable_chunked_prefill=not on_cpu(),  # fails there with a prompt in chunks and a row's seed
                enable_sleep_mode=not on_cpu(),
                tensor_parallel_size=ranks,
                distributed_executor_backend="external_launcher",
                seed=0,
            )
        except Exception as error:
            if is_lost_contact(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            problem = error.errors()[0]["msg"] if hasattr(error, "errors") else reason(error)  # of pydantic
            raise UserError(f"--rollout_engine vllm: does not start with {path}: {problem}") from error
        self._sleep()

    def hold_weights(self) -> None:
        """Push the weights now and forget the policy, which is not trained."""
        with own_state():
            self._push_weights()
        self._policy = None

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[list[int]] | Mapping[int, list[int]], rows: Sequence[int],
        options: GenerationOptions, step: int, pad_token_id: int,
    ) -> Responses:  # fmt: skip
        """As `generate`. All ranks must call it."""
        requests, own = self._requests_of_group([(row, prompts[row]) for row in rows])
        with own_state():
            if self._policy is not None:
                self._push_weights()
            # Also of the same weights: a draw must not depend on what was drawn before.
            assert self._engine.reset_prefix_cache(), "vLLM is still sampling"
            outputs = self._engine.generate(
                [{"prompt_token_ids": ids} for _, ids in requests],
                [self._settings(row, options, step) for row, _ in requests],
                use_tqdm=False,
            )
            self._sleep()
        return to_responses(outputs[own], options.max_response_length, pad_token_id)

    def _requests_of_group(self, requests: list[Request]) -> tuple[list[Request], slice]:
        """Requests of all ranks that share the weights, in the same order on each, and this rank's part."""
        if self._group_size == 1:
            return requests, slice(0, len(requests))
        first = rank() - rank() % self._group_size
        parts = gather_objects(requests)[first : first + self._group_size]
        start = sum(map(len, parts[: rank() - first]))
        return sum(parts, []), slice(start, start + len(requests))

    def _settings(self, row: int, options: GenerationOptions, step: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=options.temperature, top_p=options.top_p, top_k=options.top_k,
            max_tokens=options.max_response_length, seed=seed_of(options.seed, step, row), logprobs=0,
            ignore_eos=True, stop_token_ids=self._end_ids, detokenize=False,
        )  # fmt: skip

    def _push_weights(self) -> None:
        """Copy the policy's weights into the engine, and wake it on a GPU."""
        if not on_cpu():
            torch.cuda.empty_cache()
            self._engine.wake_up(tags=["weights"])
        weights = policy_weights(self._policy)
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not on_cpu():
            self._engine.wake_up(tags=["kv_cache"])

    def _sleep(self) -> None:
        """On a GPU, free the memory of weights and cache while the policy is trained."""
        if self._policy is not None and not on_cpu():
            self._engine.sleep(level=2)


def seed_of(seed: int, step: int, row: int) -> int:
    """Seed of a row, of 63 bits."""
    state = np.random.SeedSequence((seed, 3, step, row)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def cache_bytes(config: Any, dtype: torch.dtype, options: GenerationOptions, longest: int) -> int:
    """Memory for the keys and values of --generation_batch_size rows of full length, per rank.

    A fixed number, not a share of free memory, so that scheduling is the same in every run. `longest` tokens
    fit in any case.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    key_heads = -(-(getattr(text, "num_key_value_heads", None) or heads) // options.rollout_tensor_parallel)
    of_token = 2 * text.num_hidden_layers * key_heads * head_size(config) * dtype.itemsize
    row_blocks = -(-(options.max_prompt_length + options.max_response_length) // BLOCK)
    blocks = max(options.generation_batch_size * row_blocks, -(-longest // BLOCK)) + 1
    return blocks * BLOCK * of_token


@torch.no_grad()
def policy_weights(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """Copies of all weights, by their names in a model folder: adapters merged, 4-bit weights dequantised,
    tied weights once, and only vocabulary rows that have a token.

    Partitioned weights are gathered one at a time; all ranks must take them.
    """
    import deepspeed

    model = base_model(policy)
    if policy.zero_optimization_stage() == 3:
        policy.empty_partition_cache()  # the last forward may have prefetched weights for another
    adapted = {name: module for name, module in model.named_modules() if is_mergeable(module)}
    ends = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    by_token = {id(parameter) for module in ends for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, kind = name.rpartition(".")
        adapter = adapted.get(owner.removesuffix(".base_layer")) if kind == "weight" else None
        parts = [parameter] if adapter is None else [*adapter.parameters()]
        with deepspeed.zero.GatheredParameters(parts, enabled=any(map(is_partitioned, parts))):
            # A copy: vLLM reads it when its layer is complete, and a gathered weight is gone by then.
            weight = parameter.detach().clone() if adapter is None else merged_weight(adapter)
        if id(parameter) in by_token:
            weight = weight[: model.num_tokens]
        yield name.replace(".base_layer.", "."), weight


def to_responses(outputs: Sequence[Any], limit: int, pad_token_id: int) -> Responses:
    """Outputs of vLLM, padded to `limit` tokens."""
    answers = [output.outputs[0] for output in outputs]
    ids = torch.full((len(answers), limit), pad_token_id)
    logprobs = torch.zeros(len(answers), limit)
    for row, answer in enumerate(answers):
        tokens = [*answer.token_ids]
        drawn = [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]
        ids[row, : len(tokens)], logprobs[row, : len(tokens)] = torch.tensor(tokens), torch.tensor(drawn)
    lengths = torch.tensor([len(answer.token_ids) for answer in answers])
    ended = torch.tensor([answer.finish_reason == "stop" for answer in answers])
    read = [len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs]
    computed = torch.tensor(read) + lengths - 1
    sizes, support_ids = torch.zeros_like(ids, dtype=torch.int32), ids.new_empty(0, dtype=torch.int32)
    fields = ids, lengths, ended, logprobs, sizes, support_ids, computed
    return Responses(*(field.to(device()) for field in fields))
