"""What the student learns from: the teacher's guided path, cut into four windows of equal noise levels.

In each window (1 to 3/4, 3/4 to 1/2, ...) the student follows a straight line from where the path enters to where the
teacher, in several small guided steps, leaves it (piecewise rectified flow).  Four Euler steps then take one window
each.  In the second half of the training most paths are the student's own, so that it learns to mend what it does.
"""

import torch

import model as tiny

COUNT = 4  # windows
SMALL_STEPS = (5, 4, 4, 4)  # of the teacher in each window
AT_START = 0.6  # share of the examples right where a window begins, where four-step sampling evaluates the model


class Windows:
    """A store of (entry, exit, window, ids) on the device, refilled a batch at a time."""

    def __init__(self, size, batch, device, teacher, student, empty, guidance):
        self.teacher, self.student, self.guidance = teacher, student, guidance
        self.device, self.at, self.filled = device, 0, 0
        self.empty_ids = empty
        self.rows = max(1, size // (batch * COUNT)) * batch * COUNT
        shape = (self.rows, teacher.tokens, 64)
        self.entry = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.exit = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.window = torch.empty(self.rows, dtype=torch.int64, device=device)
        self.t5 = torch.empty(self.rows, tiny.T5_LENGTH, dtype=torch.int16, device=device)
        self.clip = torch.empty(self.rows, 77, dtype=torch.int16, device=device)

    @torch.no_grad()
    def refill(self, t5_ids, clip_ids, own_path):
        """Paths from fresh noise for these captions; own_path: between windows they are the student's."""
        text, empty = self.teacher.encode(t5_ids, clip_ids), self.teacher.encode(*self.empty_ids)
        latents = torch.randn(len(t5_ids), self.teacher.tokens, 64, device=self.device)
        for window in range(COUNT):
            leaving = self.follow_teacher(latents, window, text, empty)
            place = slice(self.at, self.at + len(latents))
            self.entry[place], self.exit[place], self.window[place] = latents, leaving, window
            self.t5[place], self.clip[place] = t5_ids, clip_ids
            self.at = (self.at + len(latents)) % self.rows
            self.filled = min(self.rows, self.filled + len(latents))
            if own_path:
                sigma = torch.full((len(latents),), 1 - window / COUNT, device=self.device)
                leaving = latents - self.student.velocity(latents, sigma, *text).float() / COUNT
            latents = leaving

    def follow_teacher(self, latents, window, text, empty):
        """The teacher's path through one window; the last window, where only detail is left, is not guided."""
        steps = SMALL_STEPS[window]
        guidance = self.guidance if window < COUNT - 1 else 1.0
        for i in range(steps):
            sigma = torch.full((len(latents),), 1 - (window + i / steps) / COUNT, device=self.device)
            latents = latents - tiny.guided(self.teacher, latents, sigma, text, empty, guidance) / (steps * COUNT)
        return latents

    def batch(self, count):
        """(latents, sigma, velocity, t5 ids, clip ids) at random places of random windows."""
        rows = torch.randint(0, self.filled, (count,), device=self.device)
        entry, leaving = self.entry[rows].float(), self.exit[rows].float()
        along = torch.rand(count, device=self.device)
        along = torch.where(torch.rand(count, device=self.device) < AT_START, torch.zeros_like(along), along)
        latents = entry + along[:, None, None] * (leaving - entry)
        sigma = 1 - (self.window[rows] + along) / COUNT
        return latents, sigma, (entry - leaving) * COUNT, self.t5[rows].long(), self.clip[rows].long()
