#!/usr/bin/env python3
"""Writes the golden fixtures of this folder with diffusers, transformers, tokenizers and torch on the CPU.

    pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0 peft==0.21.2
    python tests/golden/make_golden.py                 # all, a minute or two
    python tests/golden/make_golden.py --only NAME     # one of: models components pipelines scheduler random
                                                       #         tokenizers packing bfl lora pictures kontext cache tiny
The models are small, with random weights made here from fixed seeds: every norm weight and bias is random and no gate
is small, so that a missing branch shows. README.md beside this file lists every file and tensor.
"""

import argparse
import base64
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import struct
import sys
from collections import Counter
from pathlib import Path

VERSIONS = {
    "torch": "2.13.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "peft": "0.21.2",
}
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDERS = ("schnell-like", "dev-like")


def check_versions():
    wrong = []
    for name, wanted in VERSIONS.items():
        found = importlib.metadata.version(name).split("+")[0]
        if found != wanted:
            wrong.append(f"{name} {found}, wanted {wanted}")
    if wrong:
        sys.exit("make_golden.py: wrong versions: " + "; ".join(wrong))


check_versions()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
import diffusers  # noqa: E402
import transformers  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast  # noqa: E402

torch.set_num_threads(1)
torch.set_grad_enabled(False)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BF16 = torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers


def write_json(path, value, compact=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    if compact:
        text = json.dumps(value, separators=(",", ":"))
    else:
        text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_tensors(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, str(path))
    path.chmod(0o644)


def normal(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def randomize(model, seed, gains=()):
    """Fills every parameter in place. gains: (regular expression, factor) for weights that need another size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        shape = parameter.shape
        draw = torch.randn(shape, generator=generator)
        if name.endswith("bias") and parameter.ndim == 1:
            value = 0.2 * draw
        elif parameter.ndim == 1:  # the weight of a norm: between 0.5 and 1.5, not centred on its usual 1
            value = 0.5 + torch.rand(shape, generator=generator)
        elif "embed" in name and "embedder" not in name or name.startswith("shared"):
            value = 0.5 * draw
        else:  # Linear or Conv2d
            value = draw / math.sqrt(parameter[0].numel())
        for pattern, factor in gains:
            if re.search(pattern, name):
                value = value * factor
        parameter.copy_(value)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers with small vocabularies

CORPUS = """
a cat playing with a ball of yarn . an astronaut standing next to a giant lemon . three red apples on a blue background
a photo of a small brown dog running on the green grass in the park , high quality , detailed , sharp focus , 4 k
a painting of the sea at night with a bright moon and many stars in the style of an old master , oil on canvas
a cat holding a sign that says hello world . it's a robot's dream , isn't it ? we've seen that they're here , i'm sure
portrait of a young woman with long black hair wearing a white dress , soft light , film grain , photography
two yellow birds sitting on a wooden table beside a cup of coffee and a book , morning light , cinematic
""".split()


def bytes_to_unicode():
    """GPT-2's printable stand-in for every byte, in its order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {b: chr(b) for b in kept}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(kept))
    return table


def train_bpe(words, count):
    pieces = {tuple(word[:-1]) + (word[-1] + "</w>",): n for word, n in Counter(words).items()}
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for piece, n in pieces.items():
            for pair in zip(piece, piece[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged = {}
        for piece, n in pieces.items():
            out = []
            for symbol in piece:
                if out and (out[-1], symbol) == best:
                    out[-1] += symbol
                else:
                    out.append(symbol)
            merged[tuple(out)] = n
        pieces = merged
    return merges


def special(content, normalized=False):
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
    }


def write_clip_tokenizer(folder):
    """vocab.json, merges.txt and configs as FLUX's tokenizer/ has them. Returns the number of ids."""
    alphabet = list(bytes_to_unicode().values())
    # "ab ab" must be able to merge through a pair that only exists after another merge: order of merges matters
    merges = train_bpe(CORPUS, 200)
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens))
    start, end = len(tokens), len(tokens) + 1
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(tokens)}
    write_json(folder / "vocab.json", vocab, compact=True)
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(start): {**special("<|startoftext|>", True), "special": True},
                str(end): {**special("<|endoftext|>"), "special": True},
            },
            "bos_token": "<|startoftext|>",
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "eos_token": "<|endoftext|>",
            "errors": "replace",
            "model_max_length": 77,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": "<|endoftext|>",
        },
    )
    write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": special("<|startoftext|>", True),
            "eos_token": special("<|endoftext|>"),
            "pad_token": special("<|endoftext|>"),
            "unk_token": special("<|endoftext|>"),
        },
    )
    return len(tokens)


def build_charsmap(rules):
    """sentencepiece's precompiled_charsmap: u32 size, darts-clone double array, NUL-terminated replacements."""
    strings, where = bytearray(), {}
    trie = {}
    for source, target in sorted(rules.items()):
        if target not in where:
            where[target] = len(strings)
            strings += target.encode() + b"\0"
        node = trie
        for byte in source.encode():
            node = node.setdefault(byte, {})
        node[0] = where[target]  # label 0 ends a key
    units, used = {0: 0}, {0}

    def place(node, position, label):
        base = 1
        while any((base ^ child) in used for child in node) or base in used and 0 not in node:
            base += 1
        used.add(base)
        for child in node:
            used.add(base ^ child)
        offset = position ^ base
        assert offset < 1 << 21
        units[position] = label | (0x100 if 0 in node else 0) | offset << 10
        for child, below in sorted(node.items()):
            if child == 0:
                units[base] = 1 << 31 | below
            else:
                place(below, base ^ child, child)

    place(trie, 0, 0)
    size = (max(used) | 0xFF) + 1
    array = b"".join(struct.pack("<I", units.get(i, 0)) for i in range(size))
    return base64.b64encode(struct.pack("<I", len(array)) + array + bytes(strings)).decode()


def write_t5_tokenizer(folder):
    """tokenizer.json (Unigram) and configs as FLUX's tokenizer_2/ has them. Returns the number of ids."""
    words = Counter("▁" + word for word in CORPUS)
    pieces = Counter()
    for word, n in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + 9) + 1):
                pieces[word[start:end]] += n
    ranked = sorted(pieces, key=lambda p: (-pieces[p] * (len(p) - 1), p))[:250]
    letters = [chr(c) for c in range(33, 127)] + list("éüñçß–’“”…€日本")
    characters = Counter("".join(CORPUS))
    total = sum(pieces[p] for p in ranked) + sum(characters.values())
    vocab = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -2.0]]
    scored = [[p, math.log(pieces[p] / total)] for p in ranked]
    scored += [[c, math.log((characters[c] + 0.05) / total) - 1.0] for c in letters]
    vocab += sorted(scored, key=lambda item: (-item[1], item[0]))
    extra = [f"<extra_id_{i}>" for i in range(100)]
    first_extra = len(vocab)
    vocab += [[token, 0.0] for token in reversed(extra)]

    rules = {chr(0xFEE0 + c): chr(c) for c in range(33, 127)}  # full-width forms
    rules |= {"\t": " ", "\n": " ", "\r": " ", "\u00a0": " ", "\u3000": " ", "\u2003": " ", "\u200b": "", "\u0007": ""}
    rules |= {"ﬁ": "fi", "ﬂ": "fl", "½": "1⁄2", "²": "2", "™": "TM", "e\u0301": "é", "u\u0308": "ü", "n\u0303": "ñ"}
    end = {"id": "</s>", "type_id": 0}
    a, b = ({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
    added = list(enumerate(["<pad>", "</s>", "<unk>"])) + list(enumerate(reversed(extra), first_extra))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **special(token), "special": True} for i, token in added],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": build_charsmap(rules)},
                {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True, "prepend_scheme": "first"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [a, {"SpecialToken": end}],
            "pair": [a, {"SpecialToken": end}, b, {"SpecialToken": end}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True, "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
    }
    write_json(folder / "tokenizer.json", tokenizer, compact=True)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": True,
            "added_tokens_decoder": {str(i): {**special(token), "special": True} for i, token in added},
            "additional_special_tokens": extra,
            "clean_up_tokenization_spaces": True,
            "eos_token": "</s>",
            "extra_ids": 100,
            "legacy": False,
            "model_max_length": 512,
            "pad_token": "<pad>",
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
            "unk_token": "<unk>",
        },
        compact=True,
    )
    write_json(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": extra,
            "eos_token": special("</s>"),
            "pad_token": special("<pad>"),
            "unk_token": special("<unk>"),
        },
        compact=True,
    )
    return len(vocab)


# ---------------------------------------------------------------------------------------------------------------------
# models: the two folders, and one autoencoder of another shape

VAE_COMMON = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    sample_size=64,
)
SETTINGS = {
    "schnell-like": dict(
        seed=100,
        transformer=dict(
            attention_head_dim=32,
            num_attention_heads=2,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=40,
            pooled_projection_dim=28,
            guidance_embeds=False,
            axes_dims_rope=[8, 12, 12],
        ),
        bf16=r"^transformer_blocks\.1\.|^single",  # some blocks only: dtypes may differ from tensor to tensor
        shard="450KB",
        clip=dict(hidden_size=28, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2),
        clip_eos="legacy",
        clip_prefix="text_model.",  # as in FLUX's own files
        t5=dict(d_model=40, d_kv=16, d_ff=72, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"),
        vae=dict(
            block_out_channels=[4, 4, 8, 8],
            layers_per_block=1,
            norm_num_groups=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        scheduler=dict(shift=1.0, use_dynamic_shifting=False),
    ),
    "dev-like": dict(
        seed=200,
        transformer=dict(
            attention_head_dim=128,
            num_attention_heads=1,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=[16, 56, 56],
        ),
        bf16=r".*",  # all of every model, as in FLUX's own files
        shard="10GB",
        clip=dict(hidden_size=24, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3),
        clip_eos="true",
        clip_prefix="",  # as transformers 5 writes it
        # FLUX's own config.json says it in this way, without feed_forward_proj (which then reads "relu")
        t5=dict(
            d_model=32,
            d_kv=16,
            d_ff=56,
            num_layers=2,
            num_heads=3,
            dense_act_fn="gelu_pytorch_tanh",
            is_gated_act=True,
        ),
        vae=dict(
            block_out_channels=[6, 6, 6, 9],
            layers_per_block=2,
            norm_num_groups=3,
            use_quant_conv=True,
            use_post_quant_conv=True,
        ),
        scheduler=dict(shift=3.0, use_dynamic_shifting=True),
    ),
}


def vae_config(config):
    stages = len(config["block_out_channels"])
    return dict(
        VAE_COMMON,
        down_block_types=["DownEncoderBlock2D"] * stages,
        up_block_types=["UpDecoderBlock2D"] * stages,
        **config,
    )


VAE_GAINS = ((r"decoder\.conv_out\.weight", 0.6), (r"to_[qk]\.weight", 1.5))


def to_bf16(model, pattern):
    """Casts the parameters that match, so that they are stored in bf16."""
    for name, parameter in model.named_parameters():
        if re.search(pattern, name):
            parameter.data = parameter.data.to(BF16)
    return model


def make_folder(name):
    settings = SETTINGS[name]
    folder, seed = HERE / name, settings["seed"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    clip_vocab = write_clip_tokenizer(folder / "tokenizer")
    t5_vocab = write_t5_tokenizer(folder / "tokenizer_2")

    transformer = FluxTransformer2DModel(in_channels=64, patch_size=1, **settings["transformer"])
    randomize(transformer, seed + 1, ((r"time_text_embed.*linear_1\.weight", 1.5),))
    to_bf16(transformer, settings["bf16"]).save_pretrained(folder / "transformer", max_shard_size=settings["shard"])

    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_vocab + 8,  # ids above <|endoftext|>: the two rules for the pooled token then differ
            hidden_act="quick_gelu",
            max_position_embeddings=77,
            projection_dim=settings["clip"]["hidden_size"],
            bos_token_id=0 if settings["clip_eos"] == "legacy" else clip_vocab - 2,
            eos_token_id=2 if settings["clip_eos"] == "legacy" else clip_vocab - 1,
            pad_token_id=1 if settings["clip_eos"] == "legacy" else clip_vocab - 1,
            **settings["clip"],
        )
    )
    randomize(clip, seed + 2, ((r"[qk]_proj\.weight", 1.5),))
    to_bf16(clip, settings["bf16"]).save_pretrained(folder / "text_encoder")
    if settings["clip_prefix"]:
        path = folder / "text_encoder" / "model.safetensors"
        tensors = {settings["clip_prefix"] + key: value for key, value in load_file(path).items()}
        save_file(tensors, str(path), metadata={"format": "pt"})

    d_kv = settings["t5"]["d_kv"]
    t5 = T5EncoderModel(T5Config(vocab_size=t5_vocab, tie_word_embeddings=False, **settings["t5"]))
    # q is not scaled in T5, so its weights are small instead
    randomize(t5, seed + 3, ((r"SelfAttention\.q", 1.5 / math.sqrt(d_kv)), (r"relative_attention_bias", 2.0)))
    to_bf16(t5, settings["bf16"]).save_pretrained(folder / "text_encoder_2")

    vae = AutoencoderKL(**vae_config(settings["vae"]))
    randomize(vae, seed + 4, VAE_GAINS)
    to_bf16(vae, settings["bf16"]).save_pretrained(folder / "vae")

    FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=4096,
        max_shift=1.15,
        num_train_timesteps=1000,
        **settings["scheduler"],
    ).save_pretrained(folder / "scheduler")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "FluxPipeline",
            "_diffusers_version": VERSIONS["diffusers"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def make_models():
    for name in FOLDERS:
        make_folder(name)
    shutil.rmtree(HERE / "vae-odd", ignore_errors=True)
    odd = AutoencoderKL(
        **vae_config(
            dict(
                block_out_channels=[10, 10, 15],
                layers_per_block=2,
                norm_num_groups=5,
                use_quant_conv=True,
                use_post_quant_conv=False,
                mid_block_add_attention=False,
            )
        )
    )
    to_bf16(randomize(odd, 304, VAE_GAINS), ".*").save_pretrained(HERE / "vae-odd")


def load_pipeline(folder, dtype, pipeline=FluxPipeline):
    pipe = pipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        wrong = [name for name, p in part.named_parameters() if p.dtype != dtype]
        assert not wrong, f"{type(part).__name__}: not {dtype}: {wrong[:3]}"
        part.eval()
    return pipe


# ---------------------------------------------------------------------------------------------------------------------
# components


def both(pipes, run):
    """run(pipe, dtype) -> {name: tensor}, in fp32 as out.NAME and in bf16 as out_bf16.NAME."""
    tensors = {}
    for dtype, prefix in ((torch.float32, "out"), (BF16, "out_bf16")):
        for name, tensor in run(pipes[dtype], dtype).items():
            tensors[f"{prefix}.{name}"] = tensor.to(dtype)
    return tensors


def clip_component(pipes, folder, seed):
    pipe = pipes[torch.float32]
    end = pipe.tokenizer.eos_token_id
    texts = ["a cat playing with a ball of yarn", "it's a robot <|endoftext|> and a dog"]
    ids = [pipe.tokenizer(t, padding="max_length", max_length=77, truncation=True).input_ids for t in texts]
    # every id, no padding, and ids above the true end token before it
    every = torch.randint(0, end, (77,), generator=torch.Generator().manual_seed(seed)).tolist()
    every[9], every[20], every[30], every[50], every[76] = end + 3, end, end + 7, end + 7, end
    ids = torch.tensor(ids + [every])
    tensors = {"in.ids": ids}

    def run(pipe, dtype):
        out = pipe.text_encoder(ids)
        return {"last_hidden_state": out.last_hidden_state, "pooled": out.pooler_output}

    write_tensors(HERE / "components" / folder / "clip.safetensors", tensors | both(pipes, run))


def t5_component(pipes, folder, seed):
    pipe = pipes[torch.float32]
    text = "an astronaut standing next to a giant lemon, détail <extra_id_3>"
    short = pipe.tokenizer_2([text, ""], padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
    # 160 tokens: distances beyond relative_attention_max_distance
    long = torch.randint(0, len(pipe.tokenizer_2), (1, 160), generator=torch.Generator().manual_seed(seed))
    tensors = {"in.short": short, "in.long": long}

    def run(pipe, dtype):
        return {name: pipe.text_encoder_2(ids).last_hidden_state for name, ids in (("short", short), ("long", long))}

    bias = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.compute_bias(40, 40)
    buckets = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention._relative_position_bucket(torch.arange(-200, 201))
    tensors |= {"mid.position_bias": bias, "mid.buckets": buckets}
    write_tensors(HERE / "components" / folder / "t5.safetensors", tensors | both(pipes, run))


def transformer_component(pipes, folder, seed):
    config = SETTINGS[folder]["transformer"]
    rows, columns, words = 3, 4, 9
    img_ids = FluxPipeline._prepare_latent_image_ids(2, rows, columns, "cpu", torch.float32)
    inputs = {
        "hidden_states": normal(seed + 1, 2, rows * columns, 64),
        "encoder_hidden_states": normal(seed + 2, 2, words, config["joint_attention_dim"]),
        "pooled_projections": normal(seed + 3, 2, config["pooled_projection_dim"]),
        "timestep": torch.tensor([1.0, 0.25]),
        "img_ids": img_ids,
        "txt_ids": torch.zeros(words, 3),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = torch.tensor([2.0, 1.0])
    # The model multiplies both by 1000 in its own dtype. Those above stay exact in bf16; these do not (3500 -> 3504),
    # and the sine and cosine of them then differ much from fp32's.
    rounded = {"timestep": torch.tensor([0.7512, 0.3712])}
    if config["guidance_embeds"]:
        rounded["guidance"] = torch.tensor([3.5, 1.25])
    middles = {}

    def run(pipe, dtype):
        seen = middles.setdefault(dtype, {})
        model = pipe.transformer

        def keep(*names):
            def hook(module, args, output):
                outputs = output if isinstance(output, tuple) else (output,)
                seen.update(zip(names, outputs))

            return hook

        hooks = [
            model.time_text_embed.register_forward_hook(keep("temb")),
            model.pos_embed.register_forward_hook(keep("rope_cos", "rope_sin")),
            model.x_embedder.register_forward_hook(keep("x_embedder")),
            model.context_embedder.register_forward_hook(keep("context_embedder")),
            model.norm_out.register_forward_hook(keep("norm_out")),
        ]
        block = model.transformer_blocks[0]
        hooks += [
            block.register_forward_hook(keep("double0.encoder_hidden_states", "double0.hidden_states")),
            block.norm1.register_forward_hook(keep("double0.norm1")),
            block.attn.register_forward_hook(keep("double0.attn.hidden_states", "double0.attn.encoder_hidden_states")),
            block.ff.register_forward_hook(keep("double0.ff")),
        ]
        block = model.single_transformer_blocks[0]
        hooks += [
            block.register_forward_hook(keep("single0.encoder_hidden_states", "single0.hidden_states")),
            block.norm.register_forward_hook(keep("single0.norm")),
            block.attn.register_forward_hook(keep("single0.attn")),
        ]
        sample = model(**{name: tensor.to(dtype) for name, tensor in inputs.items()}).sample
        for hook in hooks:
            hook.remove()
        other = model(**{name: tensor.to(dtype) for name, tensor in (inputs | rounded).items()}).sample
        return {"sample": sample, "rounded.sample": other}

    tensors = {f"in.{name}": tensor for name, tensor in inputs.items()} | both(pipes, run)
    tensors |= {f"in.rounded.{name}": tensor for name, tensor in rounded.items()}
    # of the first item of the batch only, RoPE's two aside, which have no batch
    tensors |= {f"mid.{name}": t if "rope" in name else t[:1] for name, t in middles[torch.float32].items()}
    tensors |= {f"mid_bf16.{name}": middles[BF16][name][:1] for name in ("temb", "double0.hidden_states", "single0.hidden_states")}
    write_tensors(HERE / "components" / folder / "transformer.safetensors", tensors)


def vae_component(models, folder, seed, latents, images):
    """models: {dtype: AutoencoderKL}."""
    inputs = {f"latents{i}": normal(seed + i, *shape) for i, shape in enumerate(latents)}
    inputs |= {f"image{i}": normal(seed + 10 + i, *shape, scale=0.5).clamp(-1, 1) for i, shape in enumerate(images)}

    def run(vae, dtype):
        out = {}
        for name, tensor in inputs.items():
            if name.startswith("latents"):
                out[name.replace("latents", "decoded")] = vae.decode(tensor.to(dtype)).sample
            else:
                posterior = vae.encode(tensor.to(dtype)).latent_dist
                out[name.replace("image", "moments")] = posterior.parameters
                out[name.replace("image", "mode")] = posterior.mode()
        return out

    tensors = {f"in.{name}": tensor for name, tensor in inputs.items()} | both(models, run)
    write_tensors(HERE / "components" / folder / "vae.safetensors", tensors)


def make_components():
    for folder in FOLDERS:
        seed = SETTINGS[folder]["seed"] + 20
        pipes = {dtype: load_pipeline(HERE / folder, dtype) for dtype in (torch.float32, BF16)}
        clip_component(pipes, folder, seed)
        t5_component(pipes, folder, seed)
        transformer_component(pipes, folder, seed)
        vaes = {dtype: pipe.vae for dtype, pipe in pipes.items()}
        vae_component(vaes, folder, seed, [(1, 16, 4, 6), (2, 16, 3, 1)], [(1, 3, 32, 48), (1, 3, 37, 51)])
    odd = {
        dtype: AutoencoderKL.from_pretrained(HERE / "vae-odd", dtype=dtype).eval() for dtype in (torch.float32, BF16)
    }
    vae_component(odd, "vae-odd", 320, [(1, 16, 5, 8)], [(1, 3, 19, 32)])


# ---------------------------------------------------------------------------------------------------------------------
# pipelines

RUNS = {
    "schnell-like": {
        "one": dict(
            prompt="A cat playing with a ball of yarn",
            seed=42,
            num_inference_steps=4,
            height=48,
            width=80,
            guidance_scale=0.0,
            max_sequence_length=48,
        ),
        "two": dict(
            prompt="three red apples",
            prompt_2="three red apples on a blue background, oil on canvas",
            seed=7,
            num_inference_steps=2,
            height=48,
            width=32,
            guidance_scale=0.0,
            max_sequence_length=24,
            num_images_per_prompt=2,
        ),
        # a list of prompts; "" in a list of second prompts is a prompt, unlike a lone ""
        "batch": dict(
            prompt=["a cat", "two dogs on a red carpet"],
            prompt_2=["", "yarn"],
            seed=11,
            num_inference_steps=1,
            height=32,
            width=16,
            guidance_scale=0.0,
            max_sequence_length=12,
            num_images_per_prompt=2,
        ),
        "train500": dict(
            prompt="a lemon",
            seed=12,
            num_inference_steps=2,
            height=32,
            width=32,
            guidance_scale=0.0,
            max_sequence_length=12,
            num_train_timesteps=500,
        ),
    },
    "dev-like": {
        "one": dict(
            prompt="An astronaut standing next to a giant lemon",
            seed=0,
            num_inference_steps=3,
            height=48,
            width=80,
            guidance_scale=3.5,
            max_sequence_length=64,
        ),
        "two": dict(
            prompt="a photo of a small brown dog",
            prompt_2="",
            seed=123456789,
            num_inference_steps=4,
            height=32,
            width=48,
            guidance_scale=1.5,
            max_sequence_length=32,
            num_images_per_prompt=2,
        ),
        "sigmas": dict(
            prompt="a blue bird",
            seed=13,
            sigmas=[0.9, 0.5, 0.5, 0.1],
            num_inference_steps=4,
            height=32,
            width=32,
            guidance_scale=2.0,
            max_sequence_length=12,
        ),
        # 16x16 pixels: one packed token; prompt longer than max_sequence_length, so truncated
        "cut": dict(
            prompt="a painting of the sea at night with a bright moon and many stars in the style of an old master",
            seed=2**32 + 5,
            num_inference_steps=1,
            height=16,
            width=16,
            guidance_scale=30.0,
            max_sequence_length=8,
        ),
    },
}


def trace(pipe, settings):
    """Runs FluxPipeline and returns all tensors of interest, and the numbers of its schedule."""
    settings = dict(settings)
    settings.pop("num_train_timesteps", None)  # of the scheduler
    generator = torch.Generator().manual_seed(settings.pop("seed"))
    tensors = {}
    prepare = pipe.prepare_latents

    def prepare_and_keep(*args, **kwargs):
        latents, ids = prepare(*args, **kwargs)
        tensors["initial"] = latents
        return latents, ids

    def after_step(pipe, step, timestep, kept):
        tensors[f"step{step}"] = kept["latents"]
        tensors["prompt_embeds"] = kept["prompt_embeds"]
        return {}

    embeds = pipe.encode_prompt(
        settings["prompt"],
        settings.get("prompt_2"),
        num_images_per_prompt=settings.get("num_images_per_prompt", 1),
        max_sequence_length=settings["max_sequence_length"],
    )
    pipe.prepare_latents = prepare_and_keep
    image = pipe(
        **settings,
        generator=generator,
        output_type="pt",
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).images
    pipe.prepare_latents = prepare
    assert torch.equal(embeds[0], tensors["prompt_embeds"])
    tensors["pooled"] = embeds[1]
    tensors["image"] = image
    # what numpy_to_pil does with pt_to_numpy's floats
    tensors["pixels"] = torch.from_numpy((image.float().permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8"))
    tensors["sigmas"] = pipe.scheduler.sigmas
    tensors["timesteps"] = pipe.scheduler.timesteps
    return tensors


def make_pipelines():
    listing = {}
    for folder, runs in RUNS.items():
        for dtype, suffix in ((torch.float32, "fp32"), (BF16, "bf16")):
            pipe = load_pipeline(HERE / folder, dtype)
            scheduler_config = pipe.scheduler.config
            for name, settings in runs.items():
                pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
                    scheduler_config, num_train_timesteps=settings.get("num_train_timesteps", 1000)
                )
                tensors = trace(pipe, settings)
                clamped = ((tensors["image"] <= 0) | (tensors["image"] >= 1)).float().mean().item()
                last = tensors[f"step{settings['num_inference_steps'] - 1}"].float()
                print(f"  {folder} {name} {suffix}: clamped pixels {clamped:.3f}, final latents' std {last.std():.2f}")
                write_tensors(HERE / "pipelines" / f"{folder}.{name}.{suffix}.safetensors", tensors)
                listing[f"{folder}.{name}"] = {"model": folder, **settings}
    write_json(HERE / "pipelines" / "runs.json", listing)


# ---------------------------------------------------------------------------------------------------------------------
# scheduler


def floats(tensor):
    """float32 values as JSON numbers: the nearest double of the shortest text that gives the same float32 back."""
    return [float(v) for v in tensor.double()]


def pipeline_sigmas(steps):
    return [1.0 + (1.0 / steps - 1.0) * i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]


def make_scheduler():
    import numpy as np

    common = dict(base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15)
    cases = []

    def add(note, config, *, steps=None, sigmas=None, image_seq_len=None):
        scheduler = FlowMatchEulerDiscreteScheduler(**common, **config)
        mu = None if image_seq_len is None else calculate_shift(image_seq_len)
        if sigmas is None and steps is not None and note == "pipeline":
            given = np.linspace(1.0, 1 / steps, steps)  # what FluxPipeline passes
        else:
            given = sigmas
        if given is None:
            scheduler.set_timesteps(steps, mu=mu)
        else:
            scheduler.set_timesteps(sigmas=given, mu=mu)
        cases.append(
            dict(
                note=note,
                config=config,
                num_inference_steps=steps,
                given_sigmas=sigmas,
                image_seq_len=image_seq_len,
                mu=mu,
                sigmas=floats(scheduler.sigmas),
                timesteps=floats(scheduler.timesteps),
            )
        )

    steps = (1, 2, 4, 28, 50)
    for shift in (1.0, 3.0):
        for n in steps:
            add("pipeline", dict(shift=shift, use_dynamic_shifting=False), steps=n)
    for image_seq_len in (1, 24, 256, 1024, 3600, 4096, 8192):
        for n in steps:
            add("pipeline", dict(shift=3.0, use_dynamic_shifting=True), steps=n, image_seq_len=image_seq_len)
    custom = [1.0, 0.93, 0.7, 0.41, 0.05]
    add("custom", dict(shift=1.0, use_dynamic_shifting=False), sigmas=custom)
    add("custom", dict(shift=3.0, use_dynamic_shifting=False), sigmas=custom)
    add("custom", dict(shift=3.0, use_dynamic_shifting=True), sigmas=custom, image_seq_len=2304)
    for n in (2, 4, 28):  # the scheduler's own sigmas, which FluxPipeline does not use
        add("scheduler's own", dict(shift=1.0, use_dynamic_shifting=False), steps=n)
        add("scheduler's own", dict(shift=3.0, use_dynamic_shifting=False), steps=n)

    scheduler = FlowMatchEulerDiscreteScheduler(**common, shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4), mu=calculate_shift(1024))
    traces = []
    for dtype in (torch.float32, BF16):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4), mu=calculate_shift(1024))
        sample = normal(1, 12).to(dtype)
        run = dict(dtype=str(dtype).split(".")[1], sigmas=floats(scheduler.sigmas), sample=floats(sample), steps=[])
        for i, t in enumerate(scheduler.timesteps):
            velocity = normal(2 + i, 12).to(dtype)
            sample = scheduler.step(velocity, t, sample, return_dict=False)[0]
            assert sample.dtype == dtype
            run["steps"].append(dict(velocity=floats(velocity), sample=floats(sample)))
        traces.append(run)
    write_json(HERE / "scheduler.json", {"versions": VERSIONS, "cases": cases, "traces": traces}, compact=True)


# ---------------------------------------------------------------------------------------------------------------------
# random

SEEDS = [0, 1, 2, 3, 7, 42, 123, 1234, 31337, 65535, 123456789, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 42]
SEEDS += [2**53 + 2, 2**63 - 1, 2**64 - 1, -1]


def bits(tensor):
    """Bit patterns, 8 (float32) or 4 (bfloat16) hexadecimal digits a value, one string."""
    kind, width, mask = (torch.int32, 8, 0xFFFFFFFF) if tensor.dtype == torch.float32 else (torch.int16, 4, 0xFFFF)
    return "".join(f"{v & mask:0{width}x}" for v in tensor.contiguous().view(kind).flatten().tolist())


def summary(tensor):
    flat = tensor.flatten()
    raw = flat.contiguous().view(torch.uint8).numpy().tobytes()  # little endian
    return {"sha256": hashlib.sha256(raw).hexdigest(), "first": bits(flat[:16]), "last": bits(flat[-16:])}


def make_random():
    draws = []
    for seed in SEEDS:
        entry = {"seed": str(seed)}
        for dtype, name in ((torch.float32, "float32"), (BF16, "bfloat16")):
            values = {}
            for size in (1, 5, 15, 16, 17, 100):
                torch.manual_seed(seed)
                values[str(size)] = bits(torch.randn(size, dtype=dtype))
            torch.manual_seed(seed)
            values["1000"] = summary(torch.randn(1000, dtype=dtype))
            generator = torch.Generator().manual_seed(seed)
            values["1x16x32x32"] = summary(torch.randn(1, 16, 32, 32, generator=generator, dtype=dtype))
            for sizes in ((5, 16, 3), (3, 3, 3), (1, 17, 1, 20)):
                generator = torch.Generator().manual_seed(seed)
                values["+".join(map(str, sizes))] = [bits(torch.randn(n, generator=generator, dtype=dtype)) for n in sizes]
            entry[name] = values
        generator = torch.Generator().manual_seed(seed)
        entry["mixed 5 float32, 5 bfloat16, 3 float32"] = [
            bits(torch.randn(n, generator=generator, dtype=dtype)) for n, dtype in ((5, torch.float32), (5, BF16), (3, torch.float32))
        ]
        generator = torch.Generator().manual_seed(seed)
        words = [torch.empty(1, dtype=torch.int64).random_(0, 2**32, generator=generator).item() for _ in range(2)]
        entry["uint64 draws modulo 2**32"] = words
        draws.append(entry)
    value = {
        "versions": VERSIONS,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "draws": draws,
    }
    write_json(HERE / "random.json", value, compact=True)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers


def ids_of(tokenizer, text, length):
    """As FluxPipeline calls it; padding is left out, and the ids before truncation are counted."""
    call = dict(padding="max_length", max_length=length, truncation=True, return_length=False, return_overflowing_tokens=False)
    out = tokenizer(text, **call)
    kept = sum(out.attention_mask)
    assert len(out.input_ids) == length and all(i == tokenizer.pad_token_id for i in out.input_ids[kept:])
    return out.input_ids[:kept], len(tokenizer(text, padding="longest").input_ids)


def make_tokenizers():
    from tokenizer_strings import strings
    from tokenizers import Tokenizer

    texts = strings()
    write_json(HERE / "tokenizers" / "strings.json", texts, compact=True)
    data = Path(os.environ.get("FLUX_TEST_DATA") or ROOT.parent / "shared" / "data") / "FLUX.1-schnell"
    folders = {"own": HERE / "schnell-like"}
    if (data / "tokenizer_2" / "tokenizer.json").is_file():
        folders["real"] = data
    else:
        print(f"  no real tokenizers in {data}: their files stay as they are")
    for name, folder in folders.items():
        for kind, part, cls, length in (("clip", "tokenizer", CLIPTokenizer, 77), ("t5", "tokenizer_2", T5TokenizerFast, 256)):
            tokenizer = cls.from_pretrained(folder / part)
            ids, full = zip(*(ids_of(tokenizer, text, length) for text in texts))
            value = {
                "versions": VERSIONS,
                "model": "FLUX.1-schnell" if name == "real" else "schnell-like and dev-like",
                "class": type(tokenizer).__name__,
                "max_length": length,
                "pad": tokenizer.pad_token_id,
                "ids": ids,
                "untruncated": {i: n for i, n in enumerate(full) if n > length},
            }
            if kind == "t5":
                # transformers 5 rebuilds the pre-tokenizer instead of reading tokenizer.json's
                file = Tokenizer.from_file(str(folder / part / "tokenizer.json"))
                file.enable_truncation(length)
                other = {i: file.encode(text).ids for i, text in enumerate(texts)}
                value["tokenizer.json"] = {i: o for i, o in other.items() if o != list(ids[i])}
            write_json(HERE / "tokenizers" / f"{name}.{kind}.json", value, compact=True)
            print(f"  {name} {kind}: {sum(map(len, ids))} ids, {len(value['untruncated'])} truncated, "
                  f"{len(value.get('tokenizer.json', ()))} differ by tokenizer.json itself")


def make_packing():
    tensors = {}
    for batch, height, width in ((1, 64, 96), (2, 32, 16), (1, 16, 16), (1, 70, 109)):
        rows, columns = 2 * (height // 16), 2 * (width // 16)
        name = f"{batch}x{height}x{width}"
        latents = torch.arange(batch * 16 * rows * columns, dtype=torch.float32).reshape(batch, 16, rows, columns)
        packed = FluxPipeline._pack_latents(latents, batch, 16, rows, columns)
        unpacked = FluxPipeline._unpack_latents(packed, height, width, 8)
        assert torch.equal(unpacked, latents)
        tensors[f"{name}.latents"] = latents
        tensors[f"{name}.packed"] = packed
        tensors[f"{name}.image_ids"] = FluxPipeline._prepare_latent_image_ids(batch, rows // 2, columns // 2, "cpu", torch.float32)
    write_tensors(HERE / "packing.safetensors", tensors)


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def photo(width, height):
    """Soft and sharp at once: a gradient, waves that get shorter, a disc, letters' worth of lines."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    disc = (x - width * 0.6) ** 2 + (y - height * 0.4) ** 2 < (height * 0.3) ** 2
    r = 200 * x / width + 40 * np.sin(x * x / 90)
    g = np.where(disc, 230, 60 + 120 * y / height)
    b = np.where((x + 2 * y) % 23 < 2, 20, 128 + 100 * np.cos(y / 5))
    return Image.fromarray(np.stack([r, g, b], -1).clip(0, 255).astype(np.uint8))


def make_pictures():
    """Files as people have them, what Pillow reads in them, and what it resizes the first one to."""
    folder = HERE / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    source = photo(60, 44)
    alpha = Image.fromarray(np.tile(np.arange(60, dtype=np.uint8) * 4, (44, 1)))
    transparent = source.copy()
    transparent.putalpha(alpha)
    turned = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        turned[f"turned{orientation}.jpg"] = (source, dict(quality=95, exif=exif))
        if orientation == 6:
            turned["turned6.png"] = (source, dict(exif=exif))
    files = {
        "photo.png": (source, {}),
        "grey.png": (source.convert("L"), {}),
        "palette.png": (source.quantize(16), {}),
        "transparent.png": (transparent, {}),
        "photo.jpg": (source, dict(quality=90)),
        "photo444.jpg": (source, dict(quality=95, subsampling=0)),
        "progressive.jpg": (source, dict(quality=80, progressive=True)),
        "grey.jpg": (source.convert("L"), dict(quality=90)),
        **turned,
    }
    tensors = {}
    for name, (image, options) in files.items():
        image.save(folder / name, **options)
        # as diffusers' load_image
        read = ImageOps.exif_transpose(Image.open(folder / name)).convert("RGB")
        tensors[name] = torch.from_numpy(np.array(read))
    for width, height in ((48, 32), (60, 32), (48, 44), (17, 100), (1, 1), (7, 300)):
        resized = source.resize((width, height), Image.LANCZOS)
        tensors[f"{width}x{height}"] = torch.from_numpy(np.array(resized))
    write_tensors(HERE / "pictures.safetensors", tensors)


# ---------------------------------------------------------------------------------------------------------------------
# kontext

KONTEXT_RUNS = {
    "one": dict(
        prompt="make the cat wear a red hat",
        image="photo.png",
        seed=5,
        num_inference_steps=3,
        height=48,
        width=64,
        guidance_scale=2.5,
        max_sequence_length=24,
        auto_resize=False,
    ),
    # a picture that is higher than wide, several prompts and images
    "batch": dict(
        prompt=["a cat", "two dogs on a red carpet"],
        image="turned6.png",
        seed=6,
        num_inference_steps=2,
        height=32,
        width=32,
        guidance_scale=4.0,
        max_sequence_length=12,
        num_images_per_prompt=2,
        auto_resize=False,
    ),
    "text": dict(
        prompt="a painting of the sea",
        seed=7,
        num_inference_steps=2,
        height=32,
        width=48,
        guidance_scale=2.5,
        max_sequence_length=12,
    ),
    # the nearest of the preferred sizes
    "resized": dict(
        prompt="make it night",
        image="photo.png",
        seed=8,
        num_inference_steps=1,
        height=32,
        width=32,
        guidance_scale=2.5,
        max_sequence_length=8,
        auto_resize=True,
    ),
}


def trace_kontext(pipe, settings):
    settings = dict(settings)
    generator = torch.Generator().manual_seed(settings.pop("seed"))
    if "image" in settings:
        image = ImageOps.exif_transpose(Image.open(HERE / "pictures" / settings["image"])).convert("RGB")
        settings |= {"image": image, "_auto_resize": settings.pop("auto_resize")}
    tensors = {}
    prepare, encode = pipe.prepare_latents, pipe._encode_vae_image

    def encode_exactly(image, generator):
        # torch's group norm in float32 loses three digits over a million pixels
        pipe.vae.double()
        latents = encode(image.double(), generator).float()
        pipe.vae.float()
        return latents

    def prepare_and_keep(image, *args, **kwargs):
        latents, image_latents, latent_ids, image_ids = prepare(image, *args, **kwargs)
        tensors["initial"] = latents
        if image is not None:
            tensors["size"] = torch.tensor(image.shape[-2:])
            if image_latents.shape[1] < 100:
                tensors.update(image_latents=image_latents, image_ids=image_ids)
        return latents, image_latents, latent_ids, image_ids

    def after_step(pipe, step, timestep, kept):
        tensors[f"step{step}"] = kept["latents"]
        return {}

    pipe.prepare_latents = prepare_and_keep
    if settings.get("_auto_resize") and pipe.vae.dtype == torch.float32:
        pipe._encode_vae_image = encode_exactly
    image = pipe(
        **settings,
        max_area=settings["height"] * settings["width"],  # else it draws a million pixels, whatever is asked for
        generator=generator,
        output_type="pt",
        callback_on_step_end=after_step,
    ).images
    pipe.prepare_latents, pipe._encode_vae_image = prepare, encode
    tensors["pixels"] = torch.from_numpy((image.float().permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8"))
    return tensors


def make_kontext():
    """FluxKontextPipeline with the weights of dev-like."""
    for dtype, suffix in ((torch.float32, "fp32"), (BF16, "bf16")):
        pipe = load_pipeline(HERE / "dev-like", dtype, FluxKontextPipeline)
        for name, settings in KONTEXT_RUNS.items():
            write_tensors(HERE / "kontext" / f"{name}.{suffix}.safetensors", trace_kontext(pipe, settings))
    write_json(HERE / "kontext" / "runs.json", KONTEXT_RUNS)


# ---------------------------------------------------------------------------------------------------------------------
# cache

CACHE_RUNS = {
    "threshold": dict(threshold=0.72, warmup=3, seed=21, num_inference_steps=12),
    "all": dict(threshold=1e9, warmup=2, seed=22, num_inference_steps=6),
    "edit": dict(threshold=0.66, warmup=2, seed=23, num_inference_steps=12, image="photo.png"),
}


class FirstBlockCache:
    """ParaAttention's rule, around the modules of FluxTransformer2DModel."""

    def __init__(self, model, threshold, warmup):
        self.model, self.threshold, self.warmup = model, threshold, warmup
        self.steps, self.reused, self.changes = 0, [], []
        self.residual = self.added = None

    def __call__(self, hidden_states, timestep, guidance, pooled_projections, encoder_hidden_states, txt_ids, img_ids, **_):
        model = self.model
        embedded = model.x_embedder(hidden_states)
        temb = model.time_text_embed(timestep.to(embedded.dtype) * 1000, guidance.to(embedded.dtype) * 1000, pooled_projections)
        text = model.context_embedder(encoder_hidden_states)
        rotary = model.pos_embed(torch.cat((txt_ids, img_ids)))
        text, image = model.transformer_blocks[0](
            hidden_states=embedded, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary
        )
        residual = image - embedded
        near = False
        if self.residual is not None:
            change = ((residual - self.residual).abs().mean() / self.residual.abs().mean()).item()
            self.changes.append(change)
            near = self.steps >= self.warmup and change < self.threshold
        if near:
            self.reused.append(self.steps)
            result = image + self.added
        else:
            self.residual, first = residual, image
            for block in model.transformer_blocks[1:]:
                text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
            for block in model.single_transformer_blocks:
                text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
            result, self.added = image, image - first
        self.steps += 1
        return (model.proj_out(model.norm_out(result, temb)),)


def make_cache():
    """dev-like's pictures with a first-block cache in float32."""
    runs = {}
    for name, settings in CACHE_RUNS.items():
        edits = "image" in settings
        pipe = load_pipeline(HERE / "dev-like", torch.float32, FluxKontextPipeline if edits else FluxPipeline)
        cache = FirstBlockCache(pipe.transformer, settings["threshold"], settings["warmup"])
        forward, pipe.transformer.forward = pipe.transformer.forward, cache
        if edits:
            image = Image.open(HERE / "pictures" / settings["image"]).convert("RGB")
            more = dict(image=image, _auto_resize=False, max_area=48 * 32)
        else:
            more = {}
        latents = {}

        def keep(pipe, step, timestep, kept):
            latents[f"step{step}"] = kept["latents"]
            return {}

        shared = dict(prompt="a red apple", height=48, width=32, guidance_scale=3.5, max_sequence_length=16)
        pipe(
            **shared,
            **more,
            num_inference_steps=settings["num_inference_steps"],
            generator=torch.Generator().manual_seed(settings["seed"]),
            output_type="latent",
            callback_on_step_end=keep,
        )
        pipe.transformer.forward = forward
        write_tensors(HERE / "cache" / f"{name}.safetensors", latents)
        print("  ", name, cache.reused, [round(change, 3) for change in cache.changes])
        runs[name] = shared | settings | {"reused": cache.reused}
    write_json(HERE / "cache" / "runs.json", runs)


# ---------------------------------------------------------------------------------------------------------------------
# tiny


TINY_PROMPTS = (
    ("A cat playing with a ball of yarn", 0),
    ("an astronaut standing next to a giant lemon", 42),
    ("three red apples on a blue background", 1234),
)


def make_tiny():
    """models/tiny (when it has weights) through FluxPipeline in fp32: pictures as PNG, first and last latents."""
    folder = ROOT / "models" / "tiny"
    missing = [p for p in ("model_index.json", "transformer", "vae", "text_encoder", "text_encoder_2") if not (folder / p).exists()]
    if missing or not list((folder / "transformer").glob("*.safetensors")):
        sys.exit(f"models/tiny holds no trained model yet (missing: {', '.join(missing) or 'weights'})")
    pipe = load_pipeline(folder, torch.float32)
    side = pipe.vae.config.sample_size
    side = 256 if not isinstance(side, int) else side
    out = HERE / "tiny"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    runs = []
    for i, (prompt, seed) in enumerate(TINY_PROMPTS):
        settings = dict(
            prompt=prompt,
            seed=seed,
            num_inference_steps=4,
            height=side,
            width=side,
            guidance_scale=0.0,
            max_sequence_length=min(pipe.tokenizer_2.model_max_length, 512),
        )
        tensors = trace(pipe, settings)
        Image.fromarray(tensors["pixels"][0].numpy()).save(out / f"{i}.png", optimize=True)
        kept = {"initial": tensors["initial"], "final": tensors["step3"], "pooled": tensors["pooled"]}
        write_tensors(out / f"{i}.safetensors", kept)
        runs.append({"image": f"{i}.png", "tensors": f"{i}.safetensors", **settings})
    weights = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.safetensors"))}
    write_json(out / "runs.json", {"versions": VERSIONS, "model": "models/tiny", "sha256": weights, "runs": runs})


# ---------------------------------------------------------------------------------------------------------------------
# lora

# Every Linear of the transformer has one, some of another rank or alpha; of CLIP those of the attention.
LORAS = {
    "a": dict(r=4, lora_alpha=8, rank_pattern={"attn.to_q": 3, "proj_out": 2}, alpha_pattern={"attn.to_k": 1.5}),
    "b": dict(r=1, lora_alpha=1, use_rslora=False),
}


def write_lora(folder, name, seed):
    """A file as diffusers' own training scripts write it, with alpha in its metadata."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = load_pipeline(HERE / folder, torch.float32)
    modules = {}
    chosen = {
        "transformer": (pipe.transformer, r"."),
        "text_encoder": (pipe.text_encoder, r"self_attn"),
    }
    for part, (model, pattern) in chosen.items():
        if part == "text_encoder" and name != "a":
            continue
        layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.search(pattern, n)]
        model.add_adapter(LoraConfig(target_modules=layers, init_lora_weights=False, **LORAS[name]))
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in sorted(model.named_parameters()):
            if "lora_" in key:
                # large enough to show in every output, small enough that a wrong one is no catastrophe of numbers
                parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator) / parameter.shape[0] ** 0.25
        model.peft_config["default"].base_model_name_or_path = None  # a path of the machine that this runs on
        modules[part] = model
    metadata = _collate_lora_metadata(modules)
    for config in metadata.values():
        config["target_modules"] = sorted(config["target_modules"])  # a set, whose order changes from run to run
    FluxPipeline.save_lora_weights(
        save_directory=HERE / "lora",
        weight_name=f"{folder}.{name}.safetensors",
        transformer_lora_layers={k: v.to(BF16) for k, v in get_peft_model_state_dict(modules["transformer"]).items()},
        text_encoder_lora_layers={k: v.to(BF16) for k, v in get_peft_model_state_dict(modules["text_encoder"]).items()}
        if "text_encoder" in modules
        else None,
        **metadata,
    )
    path = HERE / "lora" / f"{folder}.{name}.safetensors"
    with safe_open(path, "pt") as file:  # two keys of metadata have no fixed order
        kept = {key: file.metadata()[key] for key in ("lora_adapter_metadata",)}
    save_file(load_file(path), str(path), metadata=kept)
    path.chmod(0o644)


def make_lora():
    (HERE / "lora").mkdir(exist_ok=True)
    for folder in FOLDERS:
        seed = SETTINGS[folder]["seed"] + 60
        for i, name in enumerate(LORAS):
            write_lora(folder, name, seed + i)
        given = load_file(HERE / "components" / folder / "transformer.safetensors")
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids")
        inputs = {key: given[f"in.{key}"] for key in names if f"in.{key}" in given}
        ids = load_file(HERE / "components" / folder / "clip.safetensors")["in.ids"]
        tensors = {}
        cases = {"one": {"a": 1.0}, "scaled": {"b": -0.7}, "both": {"a": 0.6, "b": 1.2}}
        for dtype, prefix in ((torch.float32, "out"), (BF16, "out_bf16")):
            for what, adapters in cases.items():
                pipe = load_pipeline(HERE / folder, dtype)
                for name in adapters:
                    pipe.load_lora_weights(HERE / "lora", weight_name=f"{folder}.{name}.safetensors", adapter_name=name)
                pipe.set_adapters(list(adapters), list(adapters.values()))
                if dtype == BF16:  # merged, as ours: in float32 that makes no difference
                    pipe.fuse_lora()
                sample = pipe.transformer(**{key: value.to(dtype) for key, value in inputs.items()}).sample
                tensors[f"{prefix}.{what}"] = sample
                if "a" in adapters:
                    tensors[f"{prefix}.{what}.pooled"] = pipe.text_encoder(ids).pooler_output
        write_tensors(HERE / "lora" / f"{folder}.outputs.safetensors", tensors)


# ---------------------------------------------------------------------------------------------------------------------
# bfl

HIDDEN = 3072  # which diffusers' converter takes for granted


def bfl_rows():
    """Rows of each tensor of a flux1-dev.safetensors with one block of each kind, by black-forest-labs/flux, model.py."""
    rows = {"img_in": HIDDEN, "txt_in": HIDDEN, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * HIDDEN}
    for name in ("time_in", "vector_in", "guidance_in"):
        rows |= {f"{name}.in_layer": HIDDEN, f"{name}.out_layer": HIDDEN}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        rows |= {f"{block}_mod.lin": 6 * HIDDEN, f"{block}_attn.qkv": 3 * HIDDEN, f"{block}_attn.proj": HIDDEN}
        rows |= {f"{block}_mlp.0": 4 * HIDDEN, f"{block}_mlp.2": HIDDEN}
    block = "single_blocks.0"
    rows |= {f"{block}.linear1": 7 * HIDDEN, f"{block}.linear2": HIDDEN, f"{block}.modulation.lin": 3 * HIDDEN}
    rows = {f"{name}.{kind}": count for name, count in rows.items() for kind in ("weight", "bias")}
    for norm in ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm"):
        rows |= {f"{norm}.{part}_norm.scale": 128 for part in ("query", "key")}
    return rows


def make_bfl():
    """Where diffusers' converters take each weight from: they are given rows that are numbered."""
    from diffusers.loaders.single_file_utils import (
        convert_flux_transformer_checkpoint_to_diffusers,
        convert_ldm_vae_checkpoint,
    )

    rows = bfl_rows()
    names = sorted(rows)
    numbered = {
        name: (torch.arange(rows[name], dtype=torch.float64) + i * 1e6).reshape(-1, 1) for i, name in enumerate(names)
    }
    transformer = {}
    for key, tensor in convert_flux_transformer_checkpoint_to_diffusers(numbered).items():
        ranges = []
        for value in tensor.flatten().tolist():
            name, row = names[int(value // 1e6)], int(value % 1e6)
            if ranges and ranges[-1][0] == name and sum(ranges[-1][1:]) == row:
                ranges[-1][2] += 1
            else:
                ranges.append([name, row, 1])
        transformer[key] = ranges

    # ae.safetensors, by black-forest-labs/flux, modules/autoencoder.py
    modules = []
    for side, count in (("encoder", 2), ("decoder", 3)):
        level = {"encoder": "down", "decoder": "up"}[side]
        modules += [f"{side}.{name}" for name in ("conv_in", "norm_out", "conv_out", "mid.attn_1.norm")]
        modules += [f"{side}.mid.attn_1.{name}" for name in ("q", "k", "v", "proj_out")]
        resnets = [f"{side}.mid.block_{i}" for i in (1, 2)]
        resnets += [f"{side}.{level}.{i}.block.{j}" for i in range(4) for j in range(count)]
        modules += [f"{resnet}.{name}" for resnet in resnets for name in ("norm1", "conv1", "norm2", "conv2")]
    modules += [f"encoder.down.{i}.block.0.nin_shortcut" for i in (1, 2)]
    modules += [f"decoder.up.{i}.block.0.nin_shortcut" for i in (0, 1)]
    modules += [f"encoder.down.{i}.downsample.conv" for i in range(3)] + [f"decoder.up.{i}.upsample.conv" for i in (1, 2, 3)]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    numbered = {name: torch.full((1, 1, 1, 1), float(i)) for i, name in enumerate(names)}
    for name in names:  # only matrices are taken apart
        if name.endswith("bias") or ".attn_1.norm" in name:
            numbered[name] = numbered[name].flatten()
    config = {"down_block_types": [None] * 4, "up_block_types": [None] * 4}
    converted = convert_ldm_vae_checkpoint(numbered, config)
    vae = {key: names[int(tensor.flatten()[0])] for key, tensor in converted.items()}
    write_json(HERE / "bfl.json", {"transformer": transformer, "vae": vae}, compact=True)


TARGETS = {
    "models": make_models,
    "components": make_components,
    "pipelines": make_pipelines,
    "scheduler": make_scheduler,
    "random": make_random,
    "tokenizers": make_tokenizers,
    "packing": make_packing,
    "bfl": make_bfl,
    "lora": make_lora,
    "pictures": make_pictures,
    "kontext": make_kontext,
    "cache": make_cache,
    "tiny": make_tiny,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=TARGETS, action="append", help="make only this; may be given again")
    chosen = parser.parse_args().only or [name for name in TARGETS if name != "tiny"]
    for name in chosen:
        print(name, flush=True)
        TARGETS[name]()


if __name__ == "__main__":
    main()
