"""Muon for the hidden matrices, AdamW for everything else, and a moving average of the weights."""

import copy

import torch


def orthogonalize(matrices):
    """The nearest semi-orthogonal matrices to a stack (n, rows, columns), by five Newton-Schulz steps."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)  # CPUs are slow in bfloat16
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalized; equal shapes go together in one batch.

    The step has the size of a usual Adam step (root mean square 0.2 times the rate), so both take similar rates.
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(list(parameters), {"lr": torch.tensor(lr), "momentum": momentum})
        self.by_shape = {}
        for parameter in self.param_groups[0]["params"]:
            self.by_shape.setdefault(parameter.shape, []).append(parameter)
        self.velocity = {p: torch.zeros_like(p) for ps in self.by_shape.values() for p in ps}

    @torch.no_grad()
    def step(self):
        lr, momentum = self.param_groups[0]["lr"], self.param_groups[0]["momentum"]
        for shape, parameters in self.by_shape.items():
            gradients = [p.grad for p in parameters]
            velocities = [self.velocity[p] for p in parameters]
            torch._foreach_lerp_(velocities, gradients, 1 - momentum)
            ahead = torch._foreach_lerp(gradients, velocities, momentum)
            updates = orthogonalize(torch.stack(ahead)).float() * (lr * (0.2 * max(shape) ** 0.5))
            torch._foreach_sub_(parameters, list(updates.unbind(0)))


class Optimizers:
    """Both optimizers under one schedule: a short warm-up in steps, then constant, then linear to zero in time.

    On a GPU the rates are tensors there and :meth:`step` launches kernels only, so that a CUDA graph can hold it.
    """

    def __init__(self, named_parameters, muon_lr, adam_lr, warmup=200, decay_from=0.45):
        hidden, other = [], []
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                (hidden if is_hidden_matrix(name, parameter) else other).append(parameter)
        on_gpu = other[0].is_cuda
        self.parts = [(Muon(hidden, muon_lr), muon_lr)] if hidden else []
        adam = torch.optim.AdamW(other, torch.tensor(adam_lr), betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu, capturable=on_gpu)
        self.parts.append((adam, adam_lr))
        for part, lr in self.parts:
            part.param_groups[0]["lr"] = torch.tensor(lr, device=other[0].device)
        self.parameters = hidden + other
        self.warmup, self.decay_from, self.steps = warmup, decay_from, 0

    def schedule(self, progress):
        """Sets the rates of the next step; progress is the part of the time budget that is used up."""
        factor = min(1.0, (self.steps + 1) / self.warmup, max(0.0, (1 - progress) / (1 - self.decay_from)))
        for part, lr in self.parts:
            part.param_groups[0]["lr"].fill_(lr * factor)
        self.steps += 1

    def step(self):
        """One step, after which there are no gradients; returns their norm."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, _ in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)
        return norm


def is_hidden_matrix(name, parameter):
    """Weights between hidden states inside a block: no embedding, no modulation, no output."""
    inside = any(part in name for part in ("transformer_blocks.", "encoder.block.", "encoder.layers."))
    modulation = any(part in name for part in ("norm1.linear", "norm1_context.linear", ".norm.linear", "relative_attention_bias"))
    return parameter.ndim == 2 and inside and not modulation


class Average:
    """An exponential moving average of a module's parameters, kept as a second module."""

    def __init__(self, module, decay):
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay, self.steps = decay, 0
        self.share = torch.zeros((), device=next(module.parameters()).device)

    def schedule(self):
        """Sets the share of the next update: large at first, while everything changes."""
        self.share.fill_(1 - min(self.decay, (1 + self.steps) / (10 + self.steps)))
        self.steps += 1

    @torch.no_grad()
    def update(self, module):
        """Moves towards the module's parameters; kernels only, as :meth:`Optimizers.step`."""
        mine = list(self.module.parameters())
        ahead = torch._foreach_sub([p.detach() for p in module.parameters()], mine)
        torch._foreach_mul_(ahead, self.share)
        torch._foreach_add_(mine, ahead)
