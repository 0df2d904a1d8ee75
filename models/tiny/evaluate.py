"""Does the model draw what it is asked for?  Prints an accuracy over 200 single-object prompts.

The pictures come from diffusers' FluxPipeline with this folder's weights (4 steps), or from another program: write the
prompts with --write-prompts, let the program draw each one into its file, and give the folder with --images.

How a picture is judged.  The background is a plane per colour channel (a + b x + c y), fitted to the border pixels by
least squares and refitted without outliers.  Pixels farther than 0.08 from it (root mean square over the channels, colours
in 0..1) are the object.  The smallest square around the object is cut out and averaged down to 24 x 24 pixels of colour,
and of mask.  Every training picture is painted upright on the same background colour and goes through the same cutting.
The distance is the mean squared difference of the colours plus half that of the masks; the prompt counts as drawn if
the nearest of all training pictures is the prompt's own.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from captions import COLORS, load_nouns, with_article
from scenes import PACKAGE, contact_sheet, load_picture

HERE = Path(__file__).parent
PATTERNS = ("{a}", "{n}", "A photo of {a}", "an emoji of {a}", "a picture of {a}.", "{A}", "a drawing of {a}", "a cute {n}",
            "{a} on a {c} background", "{a} with a {c} background", "an image of {a}", "a big {n}")
COUNT, SEED = 200, 2026
FEATURE, THRESHOLD = 24, 0.08


def prompts(nouns):
    """The fixed list of prompts: [{file, prompt, seed, code}]."""
    rng = random.Random(SEED)
    rows = []
    for i, noun in enumerate(rng.sample(nouns, COUNT)):
        name = rng.choice(noun.names)[0]
        phrase = with_article(name)
        prompt = rng.choice(PATTERNS).format(a=phrase, A=phrase.capitalize(), n=name, c=rng.choice(list(COLORS)))
        rows.append({"file": f"{i:03d}.png", "prompt": prompt, "seed": i, "code": noun.code})
    return rows


def background_plane(pixels):
    """The fitted background of (3, h, w) pixels, same shape."""
    height, width = pixels.shape[1:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y], -1)
    border = torch.ones(height, width, dtype=torch.bool)
    border[4:-4, 4:-4] = False
    design, values = terms[border], pixels[:, border].T
    keep = ((values - values.median(0).values) ** 2).mean(1) < 0.15**2
    if keep.sum() < 50:
        keep[:] = True
    for _ in range(2):
        fit = torch.linalg.lstsq(design[keep], values[keep]).solution
        error = ((values - design @ fit) ** 2).mean(1)
        keep = error <= error[keep].median() * 9 + 1e-5
    return (terms @ fit).permute(2, 0, 1)


def cut(pixels, background):
    """The object of (3, h, w) pixels as (4, FEATURE, FEATURE): colours and mask; None if nothing stands out."""
    mask = ((pixels - background) ** 2).mean(0).sqrt() > THRESHOLD
    # a lone deviating pixel is no object
    mask = F.avg_pool2d(mask[None, None].float(), 3, 1, 1)[0, 0] > 0.5
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not len(rows):
        return None
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left)
    both = torch.cat([pixels, mask[None].float()])
    square = torch.cat([background.mean((1, 2), keepdim=True), torch.zeros(1, 1, 1)]).expand(4, int(side), int(side)).clone()
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    square[:, y:y + bottom - top, x:x + right - left] = both[:, top:bottom, left:right]
    return F.interpolate(square[None], (FEATURE, FEATURE), mode="bilinear", antialias=True, align_corners=False)[0]


def nearest(pixels, sprites):
    """The index of the training picture that is nearest to the object in (3, h, w) pixels in 0..1, or None."""
    background = background_plane(pixels)
    feature = cut(pixels, background)
    if feature is None:
        return None
    flat = background.mean((1, 2), keepdim=True)
    best = (float("inf"), None)
    for i, sprite in enumerate(sprites):
        known = cut(sprite[:3] + flat * (1 - sprite[3:]), flat)
        if known is not None:
            error = (feature - known) ** 2
            best = min(best, (float(error[:3].mean() + 0.5 * error[3].mean()), i))
    return best[1]


def padded_sprites(folder, nouns):
    """Every training picture as premultiplied RGBA (4, 128, 128) with an empty margin."""
    return [F.pad(load_picture(folder, noun.code, 112), (8, 8, 8, 8)) for noun in nouns]


def draw(rows, args):
    """Yields (row, PIL image) from diffusers."""
    from diffusers import FluxPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = FluxPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.vae.config.sample_size
    for row in rows:
        yield row, pipeline(
            row["prompt"], num_inference_steps=args.steps, guidance_scale=0.0, height=side, width=side,
            max_sequence_length=args.max_sequence_length, generator=torch.Generator("cpu").manual_seed(row["seed"]),
        ).images[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", help=f"the folder assets of the unpacked `npm pack {PACKAGE}`")
    parser.add_argument("--model", default=str(HERE), help="the model folder")
    parser.add_argument("--images", help="judge the PNG files of this folder instead of drawing")
    parser.add_argument("--write-prompts", metavar="FILE", help="write the list of prompts as JSON and stop")
    parser.add_argument("--save", metavar="FILE", help="save a sheet of the pictures that were judged wrong")
    parser.add_argument("--count", type=int, default=COUNT, help="only the first so many prompts")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--max-sequence-length", type=int, default=64)
    args = parser.parse_args()
    nouns = load_nouns()
    rows = prompts(nouns)[: args.count]
    if args.write_prompts:
        Path(args.write_prompts).write_text(json.dumps(rows, indent=1) + "\n")
        return
    if not args.emoji or not Path(args.emoji).is_dir():
        raise SystemExit(f"--emoji must name the folder package/assets of the unpacked `npm pack {PACKAGE}`")
    sprites = padded_sprites(args.emoji, nouns)
    drawn = ((row, Image.open(Path(args.images) / row["file"]).convert("RGB")) for row in rows) if args.images else draw(rows, args)
    wrong, labels, right = [], [], 0
    for row, image in drawn:
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)
        guess = nearest(pixels, sprites)
        if guess is not None and nouns[guess].code == row["code"]:
            right += 1
        else:
            wrong.append(image)
            labels.append(f"{row['prompt']} -> {nouns[guess].names[0][0] if guess is not None else 'nothing'}")
            print("wrong:", labels[-1], flush=True)
    print(f"{right} of {len(rows)} right: {100 * right / len(rows):.1f} %")
    if args.save and wrong:
        contact_sheet(wrong, 6, labels).save(args.save, quality=90)


if __name__ == "__main__":
    main()
