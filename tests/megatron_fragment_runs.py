"""What the Megatron adapter finds on four ranks, in processes of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.megatron_runs import Case, Gathered, gathered, make_job, parallel, whole_weight

# isort: split
from effx_dist.engines.megatron.job_layout import JobLayout, survey
from effx_dist.shard import start_sum

NO_BUCKETS = {"bucket_size": None}
EXPERTS: dict[str, Any] = {"num_experts": 4, "config": {"moe_ffn_hidden_size": 24}}
BIASED = {
    "add_bias_linear": True,
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
}

CASES = {
    "dp4": Case(),
    "dp4, one bucket": Case(ddp=NO_BUCKETS),
    "dp4, overlap": Case(
        dtype=torch.bfloat16, ddp={"overlap_grad_reduce": True, "overlap_param_gather": True}
    ),
    "dp4, two instances": Case(instances=2),
    "dp4, whole": Case(distributed=False),
    "dp4, whole, bf16": Case(distributed=False, dtype=torch.bfloat16),
    "tp2 dp2": Case(tp=2),
    "tp2 dp2, bf16": Case(tp=2, dtype=torch.bfloat16),
    "tp2 dp2, whole, bf16": Case(tp=2, distributed=False, dtype=torch.bfloat16),
    "tp2 dp2, biases": Case(tp=2, config=BIASED),
    "tp2 dp2, padded": Case(tp=2, vocabulary=130),
    "tp2 dp2, frozen": Case(tp=2, frozen=("embedding.word_embeddings.weight",)),
    "tp4": Case(tp=4, config={"num_query_groups": 4}),
    "pp2 dp2": Case(pp=2),
    "pp2 dp2, tied": Case(pp=2, tied=True),
    "pp2 tp2, tied": Case(pp=2, tp=2, tied=True),
    "pp2 tp2, whole": Case(pp=2, tp=2, distributed=False),
    "pp2 dp2, two chunks": Case(pp=2, virtual=2, config={"num_layers": 4}),
    "ep2": Case(ep=2, **EXPERTS),
    "ep2, bf16": Case(ep=2, dtype=torch.bfloat16, **EXPERTS),
    "ep2 tp2": Case(ep=2, tp=2, **EXPERTS),
    "ep4": Case(ep=4, **EXPERTS),
    "ep2 pp2": Case(ep=2, pp=2, **EXPERTS),
    "ep2 pp2, dense first": Case(
        ep=2, pp=2, num_experts=4, config={"moe_ffn_hidden_size": 24, "moe_layer_freq": [0, 1]}
    ),
}


@dataclass
class Found:
    """Of one case, on one rank."""

    known_tensors: list[str]
    copies: int
    """How often each element is there because data-parallel ranks are not cut, or cut apart."""
    names: set[str] = field(default_factory=set)
    """Of what is trained."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    times: dict[str, set[int]] = field(default_factory=dict)
    """How often the elements of each parameter are held, over all ranks. Known to the first alone."""
    wrong_values: list[str] = field(default_factory=list)
    wrong_sums: list[str] = field(default_factory=list)
    """Parameters whose numels do not add up to the whole's over the groups that the adapter gives."""


def everything(names: list[str]) -> dict[str, Any]:
    """`Found` of these cases, as dictionaries: a class of this module would bring it along."""
    return {name: vars(_of_case(CASES[name])) for name in names}


def everything_but(names: list[str]) -> dict[str, Any]:
    return everything([name for name in CASES if name not in names])


def _of_case(case: Case) -> Found:
    with parallel(case):
        job = make_job(case)
        return _found(survey(job.optimizer, job.chunks), case, job.dp)


def _found(layout: JobLayout, case: Case, dp: int) -> Found:
    found = Found(
        [str(member) for member in layout.known_tensors], case.instances if case.distributed else dp
    )
    frozen = {member.name for member in layout.known_tensors if member.group_index < 0}
    found.names = {member.name for member in layout.known_tensors} - frozen
    for name, tensor in gathered(layout, lambda _, param: param.main).items():
        found.shapes[name] = tuple(tensor.values.shape)
        found.times[name] = tensor.times
        if not _is_as_given(name, tensor, case):
            found.wrong_values.append(name)
    for params in layout.params:
        for param in params:
            numel = torch.tensor([sum(piece.numel for piece in param.pieces)])
            start_sum(param.whole.groups, numel)()
            if int(numel) != param.whole.numel:
                found.wrong_sums.append(param.whole.name)
    return found


def _is_as_given(name: str, tensor: Gathered, case: Case) -> bool:
    """Whether what the ranks hold at each place is what make_job put there."""
    expected = whole_weight(name, tuple(tensor.values.shape)).to(case.dtype)
    return torch.equal(tensor.values.to(case.dtype), expected)
