"""A second task for the teacher while it learns: which picture is at each image token, and which ones the text names.

The scenes are composed by us, so the answers are known.  Linear heads read them from the hidden states after the double
blocks and one single block, and from both text encoders' outputs; the heads are thrown away afterwards.  It is
representation alignment (REPA) with labels in place of another model's features.  What it gains was not measured apart from
the other changes of that training.
"""

import torch
import torch.nn.functional as F

import model as tiny

TAPPED = 1  # the single block whose output the image head reads


class Hints(torch.nn.Module):
    """The heads, for ``nouns`` pictures, and their loss."""

    def __init__(self, nouns):
        super().__init__()
        self.image = torch.nn.Linear(256, nouns + 1)  # 0 is the background
        self.states = torch.nn.Linear(tiny.T5_WIDTH, nouns)
        self.pooled = torch.nn.Linear(tiny.CLIP_WIDTH, nouns)
        self.seen = None

    def tap(self, transformer):
        """Keeps the tapped block's image states at each call; after the block is compiled, if it is."""
        block = transformer.single_transformer_blocks[TAPPED]
        call = block._compiled_call_impl or block._call_impl

        def kept(*args, **kwargs):
            out = call(*args, **kwargs)
            self.seen = out[1]
            return out

        block._compiled_call_impl = kept

    def loss(self, labels, pictures, told, t5_ids, states, pooled):
        """labels: (B, tokens); pictures: (B, MAX_OBJECTS), -1 for none; told: (B,) where a caption was given."""
        logits = self.image(self.seen).flatten(0, 1).float()
        image = F.cross_entropy(logits, labels.flatten())
        named = torch.zeros(len(pictures), self.pooled.out_features + 1, device=pictures.device)
        named = named.scatter(1, pictures + 1, 1.0)[:, 1:]
        words = (t5_ids != 0)[..., None]
        mean = (states * words).sum(1) / words.sum(1)
        told = told[:, None] * 20.0 / named.shape[1]
        text = sum(
            (F.binary_cross_entropy_with_logits(head(x).float(), named, reduction="none") * told).sum(1).mean()
            for head, x in ((self.states, mean), (self.pooled, pooled))
        )
        return image, text
