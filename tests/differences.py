"Finite differences, for tests of gradients."

import torch


def slope_along(direction, value, params, h=1e-5):
    "Take the central difference of value() along a direction, a flat vector."
    moves = direction.split([p.numel() for p in params])
    before = [p.detach().clone() for p in params]
    values = []
    with torch.no_grad():
        for far in (h, -h):
            for p, old, move in zip(params, before, moves):
                p.copy_(old + far * move.view_as(p))
            values.append(value().item())
        for p, old in zip(params, before):
            p.copy_(old)
    return (values[0] - values[1]) / (2 * h)
