"""What the ranks of `test_deepspeed_vocab.py` run: engines whose head is sharded over tensor-parallel ranks."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from chunked_ce import ChunkOptions, VocabShard
from chunked_ce.cli.counted_collectives import GATHER, counted
from chunked_ce.integrations.deepspeed import token_mean
from tests.distributed.token_training import HIDDEN, LEARNING_RATE, State, new_model, window
from tests.integrations.test_deepspeed import attempt, end, masters, quiet_deepspeed

DATA, TENSOR, STEPS = 2, 2, 2
WHOLE = 10**6  # a chunk for all tokens


class Case(NamedTuple):
    stage: int
    gradients: str = "forward"
    chunk_size: int = 4

    def __str__(self):
        return f"zero{self.stage}-{self.gradients}-chunks of {self.chunk_size}"


CASES = [
    *(Case(stage, gradients) for stage in (0, 1, 2, 3) for gradients in ("forward", "backward")),
    *(Case(3, gradients, WHOLE) for gradients in ("forward", "backward")),
    Case(3, chunk_size=1),
]


class Ranks:
    """The mesh as DeepSpeed asks for it: Megatron's model parallel unit."""

    def __init__(self, mesh: DeviceMesh):
        self._mesh = mesh
        for kind, name in (("model", "tensor"), ("tensor_model", "tensor"), ("data", "data")):
            setattr(self, f"get_{kind}_parallel_group", lambda name=name: mesh.get_group(name))
            setattr(self, f"get_{kind}_parallel_rank", lambda name=name: mesh.get_local_rank(name))
            setattr(self, f"get_{kind}_parallel_world_size", lambda name=name: mesh[name].size())

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._mesh.get_group("data"))


def new_engine(case: Case, mesh: DeviceMesh):
    import deepspeed
    from deepspeed.module_inject.layers import VocabParallelLinear

    model = new_model(options=ChunkOptions(chunk_size=case.chunk_size, gradients=case.gradients))
    model.head = VocabParallelLinear(model.head, mp_group=mesh.get_group("tensor"), name="head")
    model.loss_keywords["vocab"] = VocabShard.from_deepspeed(model.head)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": STEPS,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": case.stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,  # or the head is gathered in one collective with what comes next
        },
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=Ranks(mesh))[0]


def one_step(case: Case, mesh: DeviceMesh) -> tuple[State, float, list[int]]:
    """Parameters after a step, the reported loss, and how often each forward gathered the head."""
    engine = new_engine(case, mesh)
    try:
        shard = engine.module.loss_keywords["vocab"]
        head_bytes = -(-shard.rows * HIDDEN // DATA) * 4  # of a data-parallel rank
        batches = window("uneven", mesh.get_local_rank("data"), STEPS)
        mean = token_mean(engine, [target for _, target in batches])
        loss_sums, gathers = [], []
        for tokens, target in batches:
            with counted() as collectives:
                loss_sums.append(engine(tokens, target))
                gathers.append(sum(c.name in (GATHER, "all_gather") and c.bytes == head_bytes for c in collectives()))
            engine.backward(mean(loss_sums[-1]))
            engine.step()
        return masters(engine), mean.report(loss_sums).item(), gathers
    finally:
        end(engine)


def run_all(rank: int, world_size: int) -> dict:
    import deepspeed
    from deepspeed.module_inject import layers

    quiet_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo")
    layers.set_autotp_mode(training=True)  # or its layers freeze their weights
    mesh = init_device_mesh("cpu", (DATA, TENSOR), mesh_dim_names=("data", "tensor"))
    found = {case: attempt(one_step, case, mesh) for case in CASES}
    found["not sharded"] = attempt(head_of_one_rank)
    return found


def head_of_one_rank():
    from deepspeed.module_inject.layers import VocabParallelLinear

    VocabShard.from_deepspeed(VocabParallelLinear(torch.nn.Linear(HIDDEN, 61), name="head"))
