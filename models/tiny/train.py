"""Trains the tiny FLUX model from pictures alone, in stages; see README.md for the commands.

    tokenizers   vocabularies from composed captions, written into the model folder
    autoencoder  pictures <-> 16-channel latents
    teacher      text encoders and transformer by rectified flow, on latents
    student      the transformer again, so that four steps follow the teacher's guided path
    export       the model folder in diffusers' layout, in bfloat16

Every training stage takes a time budget in seconds; its learning rate falls to zero at the end of it.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import distill
import model as tiny
from captions import MAX_OBJECTS, Composer, load_nouns
from hints import Hints
from optim import Average, Optimizers
from scenes import Painter, as_arrays, contact_sheet, to_image

HERE = Path(__file__).parent
SHEET_PROMPTS = (
    "A cat playing with a ball of yarn", "an astronaut standing next to a giant lemon", "three red apples on a blue background",
    "penguin", "a tiny dog and a huge pizza", "A robot holding a rose", "a unicorn", "a red heart on a pink background",
    "a rocket in space", "two cats", "a cup of coffee on a table", "a dragon above a castle", "A photo of a guitar.",
    "a car and a house", "a ghost wearing a top hat", "a lemon, a banana and a strawberry", "small key in the top left corner",
    "a panda eating pizza", "a fox in the forest", "a big sunflower on a gradient background from orange to purple",
    "a dinosaur riding a bicycle", "four stars on a navy background", "a bee next to a tulip", "an umbrella in front of a church",
)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tokenizers", "autoencoder", "teacher", "student", "export"))
    parser.add_argument("--emoji", required=True, help="the folder assets of the unpacked npm package of pictures")
    parser.add_argument("--state", required=True, help="a folder for what the stages hand on")
    parser.add_argument("--model", default=str(HERE), help="the model folder (tokenizers are read here, export writes here)")
    parser.add_argument("--seconds", type=float, default=60, help="the stage's time budget")
    parser.add_argument("--batch", type=int, help="pictures per step")
    parser.add_argument("--pool", type=int, default=160_000, help="latents held on the device")
    parser.add_argument("--guidance", type=float, default=2.0, help="how strongly the student's teacher is guided")
    parser.add_argument("--muon-lr", type=float, default=2.5e-3)
    parser.add_argument("--adam-lr", type=float, default=1.2e-3)
    parser.add_argument("--workers", type=int, default=12, help="processes that compose scenes")
    parser.add_argument("--side", type=int, default=tiny.SIDE, help="pixels of a picture's side, of all stages from the teacher on")
    parser.add_argument("--fresh", type=int, default=8, help="steps of the teacher for each batch of new scenes")
    parser.add_argument("--first", type=int, default=32_768, help="latents to wait for before the teacher starts")
    parser.add_argument("--hint", type=float, default=0.05, help="weight of the teacher's second task (hints.py)")
    parser.add_argument("--text", type=int, default=tiny.T5_LENGTH, help="tokens that the teacher's captions are padded to")
    parser.add_argument("--resume", action="store_true", help="the teacher starts from state/teacher.pt, else from the model folder")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


class Scenes(torch.utils.data.IterableDataset):
    """Endless chunks of composed scenes: (background, pictures, places, t5 ids, clip ids)."""

    def __init__(self, chunk, seed, tokenizers=None):
        self.chunk, self.seed, self.tokenizers = chunk, seed, tokenizers

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        torch.set_num_threads(1)
        composer = Composer(load_nouns(), self.seed * 1000 + (worker.id if worker else 0))
        while True:
            scenes = [composer.scene() for _ in range(self.chunk)]
            ids = tiny.tokenize(self.tokenizers, [s.caption for s in scenes]) if self.tokenizers else ()
            yield (*as_arrays(scenes), *(i.short() for i in ids))


def scene_chunks(args, chunk, seed, tokenizers=None):
    loader = torch.utils.data.DataLoader(
        Scenes(chunk, seed, tokenizers), batch_size=None, num_workers=args.workers, prefetch_factor=4 if args.workers else None,
    )
    return iter(loader)


class Clock:
    """The stage's time budget, and a line of the log now and then."""

    def __init__(self, seconds):
        self.start, self.seconds, self.logged, self.samples = time.time(), seconds, time.time(), 0

    @property
    def progress(self):
        return (time.time() - self.start) / self.seconds

    def log(self, step, samples, **values):
        """Prints every five seconds; reading the values waits for the device, so the queue stays short."""
        self.samples += samples
        elapsed = time.time() - self.logged
        if step % 10 == 0 and (elapsed > 5 or step == 0):
            text = " ".join(f"{k} {float(torch.as_tensor(v).detach()):.4f}" for k, v in values.items())
            print(f"{time.time() - self.start:6.1f} s step {step} {self.samples / elapsed:.0f}/s {text}", flush=True)
            self.logged, self.samples = time.time(), 0
        elif step % 10 == 0:
            float(next(iter(values.values())).detach())


def autocast(device):
    """bfloat16 arithmetic on a GPU; a CPU, good for a try only, stays with float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# -- autoencoder -----------------------------------------------------------------------------------------------------


def picture_loss(output, target):
    """Absolute and squared differences, differences of neighbours, and the same at half and quarter size."""
    loss = 0
    for weight in (1.0, 0.5, 0.25):
        error = output - target
        loss = loss + weight * (error.abs().mean() + 2 * error.square().mean())
        loss = loss + weight * 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
        output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return loss


def train_autoencoder(args, device):
    clock = Clock(args.seconds)
    autoencoder = tiny.build_autoencoder().to(device, memory_format=torch.channels_last)
    average = Average(autoencoder, 0.999)
    if not args.no_compile:
        autoencoder.encoder.compile()
        autoencoder.decoder.compile()
    optimizers = Optimizers(autoencoder.named_parameters(), 0, 1.5e-3, decay_from=0.3)
    batch = args.batch or 32
    chunks = scene_chunks(args, batch * 8, seed=1)
    painter = Painter(args.emoji, load_nouns(), device)
    step = 0
    while clock.progress < 1:
        scenes = painter.paint(*(t.to(device) for t in next(chunks)))
        for target in scenes.split(batch):
            target = target.contiguous(memory_format=torch.channels_last)
            with autocast(device):
                latent = autoencoder.encode(target).latent_dist
                output = autoencoder.decode(latent.sample()).sample
            reconstruction = picture_loss(output.float(), target)
            mean, logvar = latent.mean.float(), latent.logvar.float()
            divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            (reconstruction + 3e-4 * divergence).backward()
            optimizers.schedule(clock.progress)
            optimizers.step()
            average.schedule()
            average.update(autoencoder)
            clock.log(step, batch, loss=reconstruction, kl=divergence, mse=F.mse_loss(output.detach().float(), target))
            step += 1
    finish_autoencoder(args, device, average.module, painter, chunks)


@torch.no_grad()
def finish_autoencoder(args, device, autoencoder, painter, chunks):
    """Rounds the weights, sets shift and scale from latents, measures the quality and saves."""
    tiny.round_to_bfloat16(autoencoder)
    batch = args.batch or 32
    latents, error, pictures = [], [], []
    for _ in range(6):
        target = painter.paint(*(t.to(device) for t in next(chunks)))[:batch].contiguous(memory_format=torch.channels_last)
        with autocast(device):
            latent = autoencoder.encode(target).latent_dist.mode()
            output = autoencoder.decode(latent).sample
        latents.append(latent.float())
        error.append((output.float().clamp(-1, 1) - target).square().mean(dim=(1, 2, 3)))
        pictures += [to_image(p) for pair in zip(target[:4], output[:4]) for p in pair]
    latents, error = torch.cat(latents), torch.cat(error)
    autoencoder.register_to_config(shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4))
    decibels = 10 * torch.log10(4 / error)
    print(f"PSNR mean {decibels.mean():.2f} dB, worst {decibels.min():.2f} dB, over {len(error)} scenes")
    print("shift", autoencoder.config.shift_factor, "scale", autoencoder.config.scaling_factor)
    print("channel deviations", [round(v, 2) for v in latents.std(dim=(0, 2, 3)).tolist()])
    autoencoder.save_pretrained(Path(args.state) / "vae")
    contact_sheet(pictures, 8).save(Path(args.state) / "vae.jpg", quality=92)


def load_autoencoder(args, device):
    """The one trained last; without one, the model folder's."""
    trained = Path(args.state) / "vae"
    return AutoencoderKL.from_pretrained(trained if trained.exists() else Path(args.model) / "vae").to(device, memory_format=torch.channels_last).requires_grad_(False)


@torch.no_grad()
def encode_scenes(autoencoder, painter, chunk, device, side):
    """A chunk of scenes as normalised packed latents (B, tokens, 64) in bfloat16, their labels, pictures and ids."""
    background, pictures, places, *ids = (t.to(device, non_blocking=True) for t in chunk)
    scenes = painter.paint(background, pictures, places, side).contiguous(memory_format=torch.channels_last)
    with autocast(device):
        latents = torch.cat([autoencoder.encode(part).latent_dist.mode() for part in scenes.split(128)])
    latents = (latents.float() - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    return tiny.pack(latents).to(torch.bfloat16), painter.labels(pictures, places, side // tiny.TOKEN_SIDE), pictures.short(), *ids


@torch.no_grad()
def draw(autoencoder, tokens):
    """Packed latents as PIL images."""
    latents = tiny.unpack(tokens.float()) / autoencoder.config.scaling_factor + autoencoder.config.shift_factor
    return [to_image(autoencoder.decode(part).sample[0]) for part in latents.split(1)]


# -- teacher -----------------------------------------------------------------------------------------------------------


class Pool:
    """Latents and ids on the device; it grows to its size, then the oldest are replaced as new scenes are encoded."""

    def __init__(self, args, device, tokenizers, chunk, tokens):
        self.device, self.side, self.chunk = device, args.side, chunk
        self.size, self.at, self.filled = max(args.pool // chunk, 1) * chunk, 0, 0
        self.autoencoder = load_autoencoder(args, device)
        self.painter = Painter(args.emoji, load_nouns(), device)
        self.chunks = scene_chunks(args, chunk, 2, tokenizers)
        if not args.no_compile:
            self.autoencoder.encoder.compile()
        self.latents = torch.empty(self.size, tokens, 64, dtype=torch.bfloat16, device=device)
        self.labels, self.pictures, self.t5, self.clip = (
            torch.empty(self.size, width, dtype=torch.int16, device=device)
            for width in (tokens, MAX_OBJECTS, tiny.T5_LENGTH, 77)
        )
        start = time.time()
        while self.filled < min(args.first, self.size):
            self.refresh()
        print(f"latents of deviation {self.latents[:chunk].float().std():.3f}")
        print(f"{self.filled} scenes encoded in {time.time() - start:.1f} s", flush=True)

    def stores(self):
        return self.latents, self.labels, self.pictures, self.t5, self.clip

    def refresh(self):
        """Encodes one more chunk, in place of the oldest once the pool is full."""
        chunk = encode_scenes(self.autoencoder, self.painter, next(self.chunks), self.device, self.side)
        for store, rows in zip(self.stores(), chunk):
            store[self.at:self.at + self.chunk] = rows
        self.at = (self.at + self.chunk) % self.size
        self.filled = min(self.filled + self.chunk, self.size)

    def rows(self, count):
        return torch.randint(0, self.filled, (count,), device=self.device)

    def batch(self, rows):
        """Latents (B, tokens, 64), labels (B, tokens), pictures (B, MAX_OBJECTS) and both ids."""
        latents, *integers = (store[rows] for store in self.stores())
        return latents.float(), *(i.long() for i in integers)


def padded(t5_ids, length):
    """T5 ids padded further, or less: FluxPipeline shows the padding to the transformer, so its length matters."""
    return F.pad(t5_ids, (0, length - t5_ids.shape[1]))


def save_state(args, name, module):
    """Rounded to bfloat16, as what is exported is: half the bytes to carry from machine to machine."""
    torch.save({k: v.to(torch.bfloat16) for k, v in module.state_dict().items()}, Path(args.state) / f"{name}.pt")


def noise_levels(count, device):
    """Logit-normal noise levels, with some uniform ones so that both ends are seen."""
    sigma = torch.sigmoid(torch.randn(count, device=device))
    return torch.where(torch.rand(count, device=device) < 0.15, torch.rand(count, device=device), sigma)


def text_length(step, usual=tiny.T5_LENGTH):
    """Mostly the usual length; now and then, if it is the model's own, those that other programs pad to."""
    return (512, 128, 512, 256)[step // 40 % 4] if usual == tiny.T5_LENGTH and step % 40 == 20 else usual


def stance(usual):
    """Compiled code for the usual length only; the rare ones are not worth their compilation."""
    return torch.compiler.set_stance("default" if usual else "force_eager")


def train_teacher(args, device):
    clock = Clock(args.seconds)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be recorded (see Recorded)
    tokenizers = tiny.load_tokenizers(args.model)
    batch = args.batch or 512
    model = tiny.TinyFlux(len(tokenizers[0]), len(tokenizers[1]), args.side).to(device)
    hints = Hints(len(load_nouns())).to(device)
    if args.resume:
        saved = Path(args.state) / "teacher.pt"
        if saved.exists():
            model.load_state_dict(torch.load(saved, map_location=device))
            hints.load_state_dict(torch.load(Path(args.state) / "hints.pt", map_location=device))
        else:
            model.load(args.model)
    pool = Pool(args, device, tokenizers, batch, model.tokens)
    average = Average(model, 0.9995)
    if not args.no_compile:
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    hints.tap(model.transformer)
    optimizers = Optimizers([*model.named_parameters(), *hints.named_parameters()], args.muon_lr, args.adam_lr)
    empty = [ids.to(device) for ids in tiny.tokenize(tokenizers, [""])]

    def one_step(rows, length):
        """Forward, backward and update on these rows of the pool; device work only."""
        image, labels, pictures, t5_ids, clip_ids = pool.batch(rows)
        told = torch.rand(len(rows), device=device) >= 0.1
        t5_ids, clip_ids = torch.where(told[:, None], t5_ids, empty[0]), torch.where(told[:, None], clip_ids, empty[1])
        noise, sigma = torch.randn_like(image), noise_levels(len(rows), device)
        latents = image + sigma[:, None, None] * (noise - image)
        with autocast(device):
            text = model.encode(padded(t5_ids, length), clip_ids)
            velocity = model.velocity(latents, sigma, *text)
            seen, said = hints.loss(labels, pictures, told, padded(t5_ids, length), *text)
        loss = (velocity.float() - (noise - image)).square().mean()
        (loss + args.hint * (seen + said)).backward()
        norm = optimizers.step()
        average.update(model)
        return {"loss": loss.detach(), "seen": seen.detach(), "said": said.detach(), "norm": norm}

    usual_step = one_step if device.type == "cpu" else Recorded(one_step, batch)
    step, saved = 0, time.time()
    while clock.progress < 1:
        optimizers.schedule(clock.progress)
        average.schedule()
        length = text_length(step, args.text)
        if length == args.text:
            count = batch
            values = usual_step(pool.rows(count), length)
        else:
            count = max(1, batch * 128 // length)
            with stance(False):
                values = one_step(pool.rows(count), length)
        if step % args.fresh == 0:
            pool.refresh()
        clock.log(step, count, **values, progress=clock.progress)
        if time.time() - saved > 60:
            save_state(args, "teacher", average.module)
            save_state(args, "hints", hints)
            saved = time.time()
        step += 1
    save_state(args, "teacher", average.module)
    save_state(args, "hints", hints)
    print(f"{step} steps")
    write_sheet(args, device, average.module, tokenizers, pool.autoencoder, f"teacher_{args.side}", steps=16, guidance=args.guidance)


class Recorded:
    """A step as one CUDA graph: a small model's step is thousands of short kernels, and launching them would take longer
    than running them.  The first calls run as they are and compile; then one is recorded."""

    def __init__(self, step, count):
        self.step, self.calls, self.graph = step, 0, None
        self.rows = torch.zeros(count, dtype=torch.int64, device="cuda")

    def __call__(self, rows, length):
        self.calls += 1
        if self.calls <= 12:
            return self.step(rows, length)
        self.rows.copy_(rows)
        if self.graph is None:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self.values = self.step(self.rows, length)
            print("step recorded", flush=True)
        self.graph.replay()
        return self.values


@torch.no_grad()
def write_sheet(args, device, model, tokenizers, autoencoder, name, steps, guidance=1.0):
    """A sheet of the fixed prompts, to be looked at."""
    ids = [i.to(device) for i in tiny.tokenize(tokenizers, list(SHEET_PROMPTS))]
    empty = [i.to(device) for i in tiny.tokenize(tokenizers, [""])]
    noise = torch.randn(len(SHEET_PROMPTS), model.tokens, 64, generator=torch.Generator().manual_seed(3)).to(device)
    with autocast(device), torch.compiler.set_stance("force_eager"):
        tokens = tiny.sample(model, noise, model.encode(*ids), steps, model.encode(*empty), guidance)
        pictures = draw(autoencoder, tokens)
    contact_sheet(pictures, 6, SHEET_PROMPTS).save(Path(args.state) / f"{name}.jpg", quality=90)


# -- student and export ------------------------------------------------------------------------------------------------


def load_flux(args, device, name, tokenizers):
    model = tiny.TinyFlux(len(tokenizers[0]), len(tokenizers[1]), args.side).to(device)
    model.load_state_dict(torch.load(Path(args.state) / f"{name}.pt", map_location=device))
    return model.requires_grad_(False)


def train_student(args, device):
    clock = Clock(args.seconds)
    tokenizers = tiny.load_tokenizers(args.model)
    teacher = load_flux(args, device, "teacher", tokenizers)
    for encoder in (teacher.t5, teacher.clip):
        tiny.round_to_bfloat16(encoder)
    batch = args.batch or 512
    student = load_flux(args, device, "teacher", tokenizers)
    student.t5, student.clip = teacher.t5, teacher.clip
    student.transformer.requires_grad_(True)
    average = Average(student, 0.999)
    if not args.no_compile:
        teacher.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        student.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    optimizers = Optimizers(student.named_parameters(), args.muon_lr * 0.4, args.adam_lr * 0.4, warmup=100)
    windows = distill.Windows(
        args.pool, batch, device, teacher, student, [ids.to(device) for ids in tiny.tokenize(tokenizers, [""])], args.guidance,
    )
    captions = scene_chunks(args, batch, 5, tokenizers)
    step, refills = 0, 0
    while clock.progress < 1:
        if refills < 8 or step >= (refills - 8) * 24:
            t5_ids, clip_ids = (ids.to(device).long() for ids in next(captions)[3:])
            with autocast(device):
                windows.refill(t5_ids, clip_ids, own_path=clock.progress > 0.5 and refills % 4 != 0)
            refills += 1
            continue
        length = text_length(step)
        count = batch if length == tiny.T5_LENGTH else max(1, batch * 128 // length)
        latents, sigma, target, t5_ids, clip_ids = windows.batch(count)
        with autocast(device), stance(length == tiny.T5_LENGTH):
            with torch.no_grad():
                text = student.encode(padded(t5_ids, length), clip_ids)
            velocity = student.velocity(latents, sigma, *text)
        loss = (velocity.float() - target).square().mean()
        loss.backward()
        optimizers.schedule(clock.progress)
        norm = optimizers.step()
        average.schedule()
        average.update(student)
        clock.log(step, count, loss=loss, norm=norm, refills=refills, progress=clock.progress)
        step += 1
    save_state(args, "student", average.module)
    autoencoder = load_autoencoder(args, device)
    for steps in (1, 2, 4, 8, 28):
        write_sheet(args, device, average.module, tokenizers, autoencoder, f"student_{steps}", steps)


def export(args, device):
    """The student if there is one, else the teacher, with the autoencoder, as a diffusers folder."""
    tokenizers = tiny.load_tokenizers(args.model)
    name = "student" if (Path(args.state) / "student.pt").exists() else "teacher"
    autoencoder = load_autoencoder(args, device)
    autoencoder.register_to_config(sample_size=args.side)
    tiny.save_model(args.model, load_flux(args, device, name, tokenizers), autoencoder)
    size = sum(path.stat().st_size for path in Path(args.model).rglob("*.safetensors"))
    print(f"{name} exported, {size} bytes of safetensors")


def make_tokenizers(args):
    composer = Composer(load_nouns(), 11)
    captions = [composer.scene().caption for _ in range(150_000)]
    tiny.save_tokenizers(args.model, tiny.train_t5_tokenizer(captions), tiny.train_clip_tokenizer(captions))


def main():
    args = arguments()
    Path(args.state).mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # torch 2.11 with cuDNN 9.14: illegal memory accesses in training
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.recompile_limit = 64
    stages = {"autoencoder": train_autoencoder, "teacher": train_teacher, "student": train_student, "export": export}
    if args.stage == "tokenizers":
        make_tokenizers(args)
    else:
        stages[args.stage](args, device)


if __name__ == "__main__":
    main()
