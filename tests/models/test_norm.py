"""Moments and rows over processes: two of them with parts of a batch, against plain PyTorch on the whole."""

import os
import subprocess
import sys

import torch

from reid3d.models.norm import BatchNorm, global_moments, global_rows

WORKER = """
import sys, torch, torch.distributed as dist
from reid3d.models.norm import BatchNorm, global_moments, global_rows
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
whole = torch.load(f"{folder}/whole.pt", weights_only=True)
part = (whole["x"][:3] if rank == 0 else whole["x"][3:]).requires_grad_()
w = whole["w"][:3] if rank == 0 else whole["w"][3:]
found = {}
var, mean = torch.var_mean(part, 0, correction=0)
mean, var, count = global_moments(mean, var, len(part))
found |= {"mean": mean.detach(), "var": var.detach(), "count": count}
(part.sum() * 0 + ((part - mean) ** 3 / (var + 1)).mul(w).sum()).backward()
found["moments"], part.grad = part.grad, None
norm = BatchNorm(4).double()
norm.weight.data.copy_(whole["weight"])
(norm(part) * w).sum().backward()
found |= {"norm": part.grad, "weight": norm.weight.grad, "running_mean": norm.running_mean}
found |= {"running_var": norm.running_var, "tracked": norm.num_batches_tracked}
same = (whole["x"][:2] if rank == 0 else whole["x"][2:4]).requires_grad_()
rows = global_rows(same)
(rows[0] * rows[3] * (rank + 1)).sum().backward()
found |= {"rows": rows.detach(), "of_rows": same.grad, "labels": global_rows(torch.arange(2) + 2 * rank)}
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_with_unequal_parts(tmp_path):
    rng = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(8, 4, generator=rng, dtype=torch.float64)  # far from 0, where squares would cancel
    w, weight = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((8, 4), (4,)))
    torch.save({"x": x, "w": w, "weight": weight}, tmp_path / "whole.pt")
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

    x.requires_grad_()
    var, mean = torch.var_mean(x, 0, correction=0)
    ((x - mean) ** 3 / (var + 1)).mul(w).sum().backward()
    for found in (first, second):
        torch.testing.assert_close(found["mean"], mean.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(found["var"], var.detach(), rtol=0, atol=1e-12)
        assert found["count"] == 8
    torch.testing.assert_close(torch.cat((first["moments"], second["moments"])), x.grad)

    x.grad, norm = None, torch.nn.BatchNorm1d(4).double()
    norm.weight.data.copy_(weight)
    (norm(x) * w).sum().backward()
    torch.testing.assert_close(torch.cat((first["norm"], second["norm"])), x.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(first["weight"] + second["weight"], norm.weight.grad)
    for found in (first, second):
        torch.testing.assert_close(found["running_mean"], norm.running_mean)
        torch.testing.assert_close(found["running_var"], norm.running_var)
        assert found["tracked"] == 1

    assert torch.equal(first["rows"], x[:4]) and torch.equal(second["rows"], x[:4])
    assert first["labels"].tolist() == second["labels"].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(first["of_rows"], torch.stack([3 * x[3], 0 * x[0]]))  # of the sum of both losses
    torch.testing.assert_close(second["of_rows"], torch.stack([0 * x[0], 3 * x[0]]))


def test_one_process_gets_its_own_back():
    mean, var, x = torch.zeros(3), torch.ones(3), torch.randn(5, 3)
    ours = global_moments(mean, var, 5)
    assert ours[0] is mean and ours[1] is var and ours[2] == 5
    assert global_rows(x) is x
    ours, plain = BatchNorm(3), torch.nn.BatchNorm1d(3)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(x), plain.train(mode)(x))
    assert torch.equal(ours.running_var, plain.running_var)
