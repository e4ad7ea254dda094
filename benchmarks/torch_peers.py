"""The same trajectories by PyTorch's solvers (`pip install -e ".[bench]"`)."""

# Extras, which type checkers may not find.
# pyright: reportMissingImports=false

import importlib.util

import numpy as np


INSTALLED = all(
    importlib.util.find_spec(name) for name in ("torch", "torchdiffeq", "torchode")
)


def _velocities(xx, yx, shapes):
    """A function of a batch of flat points, by backpropagation through the moments."""
    import torch

    torch.set_num_threads(1)
    xx, yx = torch.as_tensor(xx), torch.as_tensor(yx)
    sizes = [rows * columns for rows, columns in shapes]

    def velocity(flat):
        parts = torch.split(flat, sizes, dim=-1)
        weights = [
            part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)
        ]
        below = [torch.eye(len(xx), dtype=flat.dtype).expand(len(flat), -1, -1)]
        for weight in weights:
            below.append(weight @ below[-1])
        back = yx - below[-1] @ xx
        moves = []
        for weight, lower in zip(reversed(weights), reversed(below[:-1]), strict=True):
            moves.append((back @ lower.mT).flatten(1))
            back = weight.mT @ back
        return torch.cat(moves[::-1], dim=1)

    return velocity


def torchdiffeq_run(xx, yx, shapes, starts, horizon: float, rtol: float) -> np.ndarray:
    """dopri5, one lane after the other: a batch would share its steps."""
    import torch
    from torchdiffeq import odeint

    velocity = _velocities(xx, yx, shapes)
    times = torch.tensor([0.0, horizon], dtype=torch.float64)
    ends = []
    for start in torch.as_tensor(starts):
        atol = rtol * float(start.square().mean().sqrt())
        field = lambda t, y: velocity(y[None])[0]
        ends.append(odeint(field, start, times, rtol=rtol, atol=atol)[-1].numpy())
    return np.stack(ends)


def torchode_run(xx, yx, shapes, starts, horizon: float, rtol: float) -> np.ndarray:
    """Tsit5, all lanes at once, each with steps of its own."""
    import torch
    import torchode

    velocity = _velocities(xx, yx, shapes)
    starts = torch.as_tensor(starts)
    atol = rtol * float(starts.square().mean().sqrt())
    term = torchode.ODETerm(lambda t, y: velocity(y))
    method = torchode.Tsit5(term=term)
    control = torchode.IntegralController(atol=atol, rtol=rtol, term=term)
    times = torch.tensor([0.0, horizon], dtype=torch.float64).expand(len(starts), 2)
    problem = torchode.InitialValueProblem(y0=starts, t_eval=times)
    solver = torchode.AutoDiffAdjoint(method, control)
    return solver.solve(problem).ys[:, -1].numpy()
