"""Draws scenes in batches with torch: a background, then each picture by alpha compositing."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from captions import DIAGONAL, HORIZON, MAX_OBJECTS, VERTICAL

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
SPRITE = 256  # pixels of a picture's side at full size
LEVELS = (256, 128, 64, 32)  # sizes kept of each picture; the nearest larger one is sampled, so nothing aliases


def load_picture(folder, code, side=SPRITE):
    """One picture cropped to what is visible and centred in a square: float32 premultiplied RGBA, (4, side, side)."""
    path = Path(folder) / f"{code}.webp"
    if not path.exists():
        raise SystemExit(f"{path} is missing: unpack `npm pack {PACKAGE}` and give its folder assets")
    picture = Image.open(path).convert("RGBA")
    box = picture.getchannel("A").point(lambda v: 255 if v > 24 else 0).getbbox()
    width, height = box[2] - box[0], box[3] - box[1]
    longest = max(width, height)
    pixels = np.asarray(picture.crop(box), np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    square = np.zeros((longest, longest, 4), np.float32)
    top, left = (longest - height) // 2, (longest - width) // 2
    square[top:top + height, left:left + width] = pixels
    tensor = torch.from_numpy(square).permute(2, 0, 1)[None]
    return F.interpolate(tensor, (side, side), mode="bilinear", antialias=True, align_corners=False)[0]


class Painter:
    """Holds the pictures on a device and paints batches of scenes."""

    def __init__(self, folder, nouns, device):
        full = torch.stack([load_picture(folder, n.code) for n in nouns])
        self.device = device
        self.levels = [
            F.interpolate(full, (s, s), mode="area").to(device, torch.float16 if device.type == "cuda" else torch.float32)
            for s in LEVELS
        ]

    def background(self, spec, side):
        """``spec`` (B, 7): first colour, second colour, shape.  Returns (B, 3, side, side) in 0..1."""
        first, second, shape = spec[:, 0:3, None, None], spec[:, 3:6, None, None], spec[:, 6, None, None]
        axis = (torch.arange(side, device=self.device) + 0.5) / side
        y, x = axis[None, :, None], axis[None, None, :]
        horizon = torch.sigmoid((y - 0.62) * 100)
        t = torch.where(shape == VERTICAL, y, torch.where(shape == DIAGONAL, (x + y) / 2, torch.where(shape == HORIZON, horizon, x * 0)))
        return first + (second - first) * t[:, None]

    def paint(self, background, pictures, places, side=256):
        """Scenes as (B, 3, side, side) float32 in -1..1.

        background: (B, 7); pictures: (B, MAX_OBJECTS) index or -1; places: (B, MAX_OBJECTS, 4) x, y, size, angle.
        """
        canvas = self.background(background, side)
        for slot in range(pictures.shape[1]):
            size = places[:, slot, 2] * side
            present = pictures[:, slot] >= 0
            for level, sprites in enumerate(self.levels):
                fits = present & (size <= LEVELS[level] * 1.2)
                if level + 1 < len(LEVELS):
                    fits &= size > LEVELS[level + 1] * 1.2
                if level == 0:
                    fits |= present & (size > LEVELS[0] * 1.2)
                rows = fits.nonzero()[:, 0]
                if len(rows):
                    canvas[rows] = self.over(canvas[rows], sprites[pictures[rows, slot]], places[rows, slot])
        return canvas * 2 - 1

    def labels(self, pictures, places, grid):
        """Which picture is on top at each place of a (grid, grid) raster: (B, grid * grid), index + 1, 0 where none is."""
        labels = torch.zeros(len(pictures), grid * grid, dtype=torch.int16, device=self.device)
        clear = torch.zeros(len(pictures), 3, grid, grid, device=self.device)
        for slot in range(pictures.shape[1]):
            mask = self.levels[-1][pictures[:, slot].clamp(min=0), 3:].expand(-1, 4, -1, -1).float()
            mask = (self.over(clear, mask, places[:, slot].where(places[:, slot] != 0, 1e-3))[:, 0] > 0.5).flatten(1)
            mask &= pictures[:, slot, None] >= 0
            labels = torch.where(mask, (pictures[:, slot, None] + 1).short(), labels)
        return labels

    def over(self, canvas, sprites, places):
        """Each sprite (N, 4, s, s) over its canvas (N, 3, h, h)."""
        x, y, size, angle = places.unbind(1)
        cos, sin = torch.cos(torch.deg2rad(angle)) / size, torch.sin(torch.deg2rad(angle)) / size
        shift_x, shift_y = 2 * x - 1, 2 * y - 1
        theta = torch.stack([cos, sin, -(cos * shift_x + sin * shift_y), -sin, cos, sin * shift_x - cos * shift_y], 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, (len(x), 4, *canvas.shape[2:]), align_corners=False)
        layer = F.grid_sample(sprites, grid.to(sprites.dtype), mode="bilinear", align_corners=False).float()
        return layer[:, :3] + canvas * (1 - layer[:, 3:])


def as_arrays(scenes):
    """A list of :class:`captions.Scene` as the three tensors that :meth:`Painter.paint` takes."""
    count = len(scenes)
    background = np.zeros((count, 7), np.float32)
    pictures = np.full((count, MAX_OBJECTS), -1, np.int64)
    places = np.zeros((count, MAX_OBJECTS, 4), np.float32)
    for i, scene in enumerate(scenes):
        first, second, shape = scene.background
        background[i] = [c / 255 for c in (*first, *second)] + [shape]
        for slot, (index, x, y, size, angle) in enumerate(scene.objects):
            pictures[i, slot] = index
            places[i, slot] = x, y, size, angle
    return torch.from_numpy(background), torch.from_numpy(pictures), torch.from_numpy(places)


def to_image(pixels):
    """(3, h, w) in -1..1 as a PIL image."""
    array = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def contact_sheet(images, columns, labels=None):
    """PIL images of one size in a grid, each above its label."""
    from PIL import ImageDraw

    width, height = images[0].size
    caption = 14 if labels else 0
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * (height + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * width, i // columns * (height + caption)
        sheet.paste(image, (x, y))
        if labels:
            draw.text((x + 2, y + height + 1), labels[i][: width // 6], fill="black")
    return sheet
