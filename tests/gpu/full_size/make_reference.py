#!/usr/bin/env python3
"""Writes a FLUX.1 checkpoint with random weights, and what diffusers computes with it: compare.ts is its reader.

    python3 make_reference.py --configs FLUX.1-schnell --out /dev/shm/flux

Needs torch, transformers and diffusers, and for the real size a GPU with 80 GB and 36 GB in --out. --configs is a
folder in diffusers' layout with configs and tokenizers; weights in it are not looked at. --out gets

    model/                   the checkpoint: bfloat16, sharded, configs and tokenizers copied
    reference.safetensors    float32, beside inputs the outputs of float32 (suffix .f32) and of bfloat16 (.bf16)
    reference.json           settings, versions, and diffusers' times in bfloat16, medians in milliseconds

Both dtypes have the same weights, those of the file. In float32 nothing is computed in TF32. Parts are on the GPU one
after another, so that float32 fits.
"""

import argparse
import gc
import json
import math
import re
import shutil
import statistics
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

torch.set_grad_enabled(False)
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

BF16 = torch.bfloat16
STARTED = time.time()


def log(*words):
    print(f"[{time.time() - STARTED:6.1f} s]", *words, flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="T5 tokens")
    parser.add_argument("--guidance", type=float, default=3.5, help="read by models with guidance")
    parser.add_argument("--prompt", default="A cat playing with a ball of yarn")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each part")
    return parser.parse_args()


def randomize(model, seed, gains=()):
    """Fills every parameter so that activations keep their size. gains: (regular expression, factor)."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.05, generator=generator)
        elif re.search(r"(token_embedding|position_embedding|shared|embed_tokens|relative_attention_bias)", name):
            parameter.normal_(0.0, 1.0, generator=generator)
        else:
            parameter.normal_(0.0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
        for pattern, factor in gains:
            if re.search(pattern, name):
                parameter.mul_(factor)
    return model.eval()


def build(make, device):
    """A model whose parameters are made in bfloat16 on the device, without a copy on the host."""
    torch.set_default_dtype(BF16)
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(torch.float32)


def median_ms(device, run, count):
    """Median time of `run` after warm-up; by events on a GPU."""
    for _ in range(min(3, count)):
        run()
    times = []
    for _ in range(count):
        if device == "cpu":
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def release(device):
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def normal(seed, *shape):
    """Inputs that bfloat16 holds exactly, so that both dtypes are given the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16).float()


class Reference:
    def __init__(self, args):
        self.args = args
        self.device = args.device
        self.model = args.out / "model"
        self.tensors = {}
        self.times = {}
        if args.out.exists():
            shutil.rmtree(args.out)
        self.model.mkdir(parents=True)
        for name in ("model_index.json", "scheduler", "tokenizer", "tokenizer_2"):
            copy = shutil.copytree if (args.configs / name).is_dir() else shutil.copyfile
            copy(args.configs / name, self.model / name)

    def config(self, part):
        return json.loads((self.args.configs / part / "config.json").read_text())

    def store(self, part, model):
        """Writes the weights in shards, with the config that the model was made from."""
        model.save_pretrained(self.model / part, max_shard_size="5GB")
        shutil.copyfile(self.args.configs / part / "config.json", self.model / part / "config.json")
        log("wrote", part)

    def put(self, name, tensor):
        self.tensors[name] = tensor.detach().to("cpu", torch.float32).contiguous()

    def both(self, model, run):
        """Calls run(dtype's name, dtype) in bfloat16, then in float32 with the same weights."""
        run("bf16", BF16)
        model.float()
        release(self.device)
        run("f32", torch.float32)

    # -----------------------------------------------------------------------------------------------------------------

    def text(self):
        """CLIP's pooled output and T5's output for the prompt."""
        args, device = self.args, self.device
        clip_tokenizer = CLIPTokenizer.from_pretrained(args.configs / "tokenizer")
        t5_tokenizer = T5TokenizerFast.from_pretrained(args.configs / "tokenizer_2")

        def tokenize(tokenizer, length):
            options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            return tokenizer([args.prompt], **options).input_ids

        clip_ids = tokenize(clip_tokenizer, clip_tokenizer.model_max_length)
        t5_ids = tokenize(t5_tokenizer, args.tokens)

        clip = build(lambda: CLIPTextModel(CLIPTextConfig(**self.config("text_encoder"))), device)
        randomize(clip, 1)
        self.store("text_encoder", clip)
        config = T5Config(**self.config("text_encoder_2"))
        assert config.is_gated_act, "the config is not read as that of T5 v1.1"
        t5 = build(lambda: T5EncoderModel(config), device)
        # T5 has no attention scale: its queries are trained small.
        randomize(t5, 2, [(r"SelfAttention\.q\.weight$", config.d_kv**-0.5)])
        self.store("text_encoder_2", t5)

        clip_ids, t5_ids = clip_ids.to(device), t5_ids.to(device)
        encode = lambda: (t5(t5_ids)[0], clip(clip_ids).pooler_output)  # noqa: E731
        self.times["text"] = median_ms(device, encode, args.runs)
        log("text encoders", self.times["text"], "ms")
        self.both(t5, lambda name, _: self.put(f"t5.{name}", t5(t5_ids)[0]))
        self.both(clip, lambda name, _: self.put(f"clip.{name}", clip(clip_ids).pooler_output))

    def transformer(self):
        """One forward pass on given inputs, and the whole denoising loop on the prompt's text."""
        args, device = self.args, self.device
        config = self.config("transformer")
        model = build(lambda: FluxTransformer2DModel.from_config(config), device)
        randomize(model, 3, [(r"norm(1|1_context|_out)?\.linear\.weight$", 0.5)])
        self.store("transformer", model)
        config = model.config

        rows, columns = args.height // 16, args.width // 16
        inputs = {
            "hidden_states": normal(10, 1, rows * columns, config.in_channels),
            "encoder_hidden_states": normal(11, 1, args.tokens, config.joint_attention_dim),
            "pooled_projections": normal(12, 1, config.pooled_projection_dim),
        }
        for name, value in inputs.items():
            self.put(f"step.{name}", value)
        guidance = torch.full([1], args.guidance) if config.guidance_embeds else None
        ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32)

        def forward(dtype):
            # 1.0, the noise level of the first step, is exact in bfloat16 also when it is multiplied by 1000.
            return model(
                **{name: value.to(device, dtype) for name, value in inputs.items()},
                timestep=torch.ones(1, device=device, dtype=dtype),
                guidance=None if guidance is None else guidance.to(device, dtype),
                txt_ids=torch.zeros(args.tokens, 3, device=device, dtype=dtype),
                img_ids=ids.to(dtype),
                return_dict=False,
            )[0]

        self.times["step"] = median_ms(device, lambda: forward(BF16), args.runs)
        log("step", self.times["step"], "ms")
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(args.configs / "scheduler"),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=model,
        )
        pipeline.set_progress_bar_config(disable=True)

        def run(name, dtype):
            self.put(f"step.{name}", forward(dtype))
            latents = pipeline(
                prompt_embeds=self.tensors[f"t5.{name}"].to(device, dtype),
                pooled_prompt_embeds=self.tensors[f"clip.{name}"].to(device, dtype),
                height=args.height,
                width=args.width,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                max_sequence_length=args.tokens,
                generator=torch.Generator("cpu").manual_seed(args.seed),
                output_type="latent",
            ).images
            self.put(f"latents.{name}", FluxPipeline._unpack_latents(latents, args.height, args.width, 8))
            log("denoised in", name)

        self.both(model, run)

    def decoder(self):
        """Given latents, and those of the loop, to pictures."""
        args, device = self.args, self.device
        model = build(lambda: AutoencoderKL.from_config(self.config("vae")), device)
        randomize(model, 4)
        self.store("vae", model)
        config = model.config
        latents = normal(20, 1, config.latent_channels, args.height // 8, args.width // 8)
        self.put("decode.latents", latents)

        def decode(x, dtype):
            x = x.to(device, dtype) / config.scaling_factor + config.shift_factor
            return model.decode(x, return_dict=False)[0]

        self.times["decode"] = median_ms(device, lambda: decode(latents, BF16), args.runs)
        log("decode", self.times["decode"], "ms")

        def run(name, dtype):
            self.put(f"decode.{name}", decode(latents, dtype))
            self.put(f"image.{name}", decode(self.tensors[f"latents.{name}"], dtype))

        self.both(model, run)

    def write(self):
        args = self.args
        for name, tensor in self.tensors.items():
            assert torch.isfinite(tensor).all(), f"{name} is not finite"
        save_file(self.tensors, str(args.out / "reference.safetensors"))
        settings = {
            name: getattr(args, name) for name in ("prompt", "seed", "height", "width", "steps", "tokens", "guidance")
        }
        report = {
            **settings,
            "milliseconds": self.times,
            "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(),
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        }
        (args.out / "reference.json").write_text(json.dumps(report, indent=1) + "\n")
        log(json.dumps(report))


def main():
    reference = Reference(parse())
    for part in (reference.text, reference.transformer, reference.decoder):
        part()
        release(reference.device)
    reference.write()


if __name__ == "__main__":
    main()
