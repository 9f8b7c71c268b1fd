"""The parts that the examples with a `Trainer` share: a small Llama, settings, a report of time and memory."""

import statistics
import time

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from common.peak_memory import PeakMemory

VOCAB = 131_072


def new_llama(width: int, depth: int, heads: int, context: int, **keywords: int) -> LlamaForCausalLM:
    """A Llama from a fixed seed, whose head shares its weight with the embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **keywords,
    )
    return LlamaForCausalLM(config)


def settings(folder: str, steps: int, **keywords) -> dict:
    """The keywords of `TrainingArguments` for so many steps that log each loss and save nothing."""
    shared = {"output_dir": folder, "max_steps": steps, "bf16": torch.cuda.is_available(), "disable_tqdm": True}
    return shared | {"logging_steps": 1, "save_strategy": "no", "report_to": []} | keywords


class Report(TrainerCallback):
    """Prints the numbers of each step by the ``names`` of the logs, and at the end time and peak memory."""

    def __init__(self, *names: str):
        self.names = names

    def on_train_begin(self, args, state, control, **kwargs):
        self.memory, self.seconds = PeakMemory(), []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs, **kwargs):
        if self.names[0] in logs and state.is_world_process_zero:
            shown = "  ".join(f"{name} {float(logs[name]):.4f}" for name in self.names)
            print(f"step {state.global_step:4}  {shown}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        peak = torch.tensor(self.memory.bytes(), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        if state.is_world_process_zero:
            seconds, mebibytes = statistics.median(self.seconds), peak.item() / 2**20
            print(f"{seconds:.2f} s per step, training took {mebibytes:,.0f} MiB at its peak", flush=True)
