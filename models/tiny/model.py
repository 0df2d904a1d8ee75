"""The tiny FLUX model: its sizes, its tokenizers, and how it is built, sampled and saved in diffusers' layout."""

import collections
import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

SIDE = 256  # pixels of a picture's side
TOKEN_SIDE = 16  # pixels of an image token's side: the autoencoder's factor 8 times the 2 x 2 packing
T5_LENGTH = 64  # tokens that a prompt is padded to
T5_VOCABULARY = 1700
T5_PIECES = 400  # of them, pieces that the Unigram trainer finds
CLIP_VOCABULARY = 1400
T5_WIDTH = 256
CLIP_WIDTH = 128


def build_autoencoder():
    """16 latent channels, factor 8, no quant convolutions."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 112),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=SIDE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def build_transformer():
    """Two heads of 128; modulation and output start at zero, so that every block starts as the identity."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )
    for name, module in transformer.named_modules():
        if name.endswith((".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear", "proj_out")) and (
            not name.startswith("single") or ".norm." in name
        ):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return transformer


def build_t5(vocabulary):
    """T5 v1.1's encoder: gated gelu, RMS norm, relative positions."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=T5_WIDTH, d_kv=64, d_ff=448, num_layers=3, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )


def build_clip(vocabulary):
    """CLIP's text model; the pooled output is taken at the first end token, the vocabulary's last entry."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=CLIP_WIDTH, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=CLIP_WIDTH,
            bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        )
    )


def build_scheduler():
    """As FLUX.1 [schnell]'s: no shift."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False)


# -- tokenizers ------------------------------------------------------------------------------------------------------


def train_t5_tokenizer(captions):
    """A Unigram vocabulary in T5's order: <pad>, </s>, <unk>, then pieces with their log probabilities.

    The captions' own words come first, whole; smaller pieces and single characters are for every other word.
    """
    pretokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pretokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=T5_PIECES, special_tokens=special, unk_token="<unk>",
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["\u2581"], show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    scores = {piece: score for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"] if piece not in special}
    words = collections.Counter("\u2581" + word.strip(".,") for caption in captions for word in caption.split())
    total = sum(words.values())
    usual = [w for w in words if not w[2:].isupper()]
    for word in sorted(usual, key=lambda w: (w != w.lower(), -words[w], w)):
        if len(scores) + len(special) >= T5_VOCABULARY:
            break
        scores[word] = max(math.log(words[word] / total), scores.get(word, -math.inf))
    vocabulary = [(piece, 0.0) for piece in special] + sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=T5_LENGTH)


def train_clip_tokenizer(captions):
    """Byte-pair merges in CLIP's order: bytes, bytes that end a word, merges, start and end tokens."""
    probe = CLIPTokenizer()._tokenizer
    words = collections.Counter()
    for caption in captions:
        words.update(piece for piece, _ in probe.pre_tokenizer.pre_tokenize_str(probe.normalizer.normalize_str(caption)))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = alphabet + [a + "</w>" for a in alphabet]
    split = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while len(vocabulary) < CLIP_VOCABULARY - 2:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(split[word], split[word][1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        if "".join(best) not in vocabulary:
            vocabulary.append("".join(best))
        for word, symbols in split.items():
            if best[0] in symbols:
                split[word] = merged(symbols, best)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=77)


def merged(symbols, pair):
    """The symbols with every occurrence of the pair joined."""
    out, i = [], 0
    while i < len(symbols):
        if symbols[i:i + 2] == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return tuple(out)


def save_tokenizers(folder, t5, clip):
    """Writes tokenizer/ (vocab.json, merges.txt, as FLUX ships it) and tokenizer_2/ (tokenizer.json)."""
    folder = Path(folder)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_2").mkdir(parents=True, exist_ok=True)
    model = json.loads(clip._tokenizer.to_str())["model"]
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    write_json(folder / "tokenizer/vocab.json", model["vocab"])
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "tokenizer/special_tokens_map.json", marks)
    write_json(folder / "tokenizer/tokenizer_config.json", {
        **marks, "add_prefix_space": False, "clean_up_tokenization_spaces": True, "do_lower_case": True, "errors": "replace",
        "model_max_length": 77, "tokenizer_class": "CLIPTokenizer",
    })
    t5._tokenizer.no_padding()
    t5._tokenizer.no_truncation()
    t5._tokenizer.save(str(folder / "tokenizer_2/tokenizer.json"))
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_2/special_tokens_map.json", marks)
    write_json(folder / "tokenizer_2/tokenizer_config.json", {
        **marks, "additional_special_tokens": [], "clean_up_tokenization_spaces": False, "extra_ids": 0,
        "model_max_length": T5_LENGTH, "tokenizer_class": "T5Tokenizer",
    })


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def load_tokenizers(folder):
    """(T5's, CLIP's) tokenizers of a model folder."""
    return T5TokenizerFast.from_pretrained(Path(folder) / "tokenizer_2"), CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")


def tokenize(tokenizers, captions, length=T5_LENGTH):
    """Ids as FluxPipeline makes them: T5's (B, length) and CLIP's (B, 77)."""
    t5, clip = tokenizers
    one = t5(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    two = clip(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return one, two


# -- the model as one module -----------------------------------------------------------------------------------------


class TinyFlux(torch.nn.Module):
    """Both text encoders and the transformer, for pictures of one side in pixels; at SIDE it is what FluxPipeline calls."""

    def __init__(self, t5_vocabulary, clip_vocabulary, side=SIDE):
        super().__init__()
        grid = side // TOKEN_SIDE
        self.tokens = grid**2
        self.t5 = build_t5(t5_vocabulary)
        self.clip = build_clip(clip_vocabulary)
        self.transformer = build_transformer()
        # Smaller pictures are seen as coarser ones: a place has the same coordinates at every size.
        row = (torch.arange(grid) + 0.5) * (SIDE / side) - 0.5
        image_ids = torch.stack([torch.zeros(grid, grid), row[:, None].expand(grid, grid), row.expand(grid, grid)], -1)
        self.register_buffer("image_ids", image_ids.reshape(-1, 3), persistent=False)

    def load(self, folder):
        """Starts from the weights of a saved model folder."""
        self.t5.load_state_dict(T5EncoderModel.from_pretrained(Path(folder) / "text_encoder_2").state_dict())
        self.clip.load_state_dict(CLIPTextModel.from_pretrained(Path(folder) / "text_encoder").state_dict())
        self.transformer.load_state_dict(FluxTransformer2DModel.from_pretrained(Path(folder) / "transformer").state_dict())

    def encode(self, t5_ids, clip_ids):
        """(B, L, 256) states for the joint attention and the (B, 128) pooled vector."""
        return self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output

    def velocity(self, latents, sigma, states, pooled):
        """The model's (noise - image) at (B, tokens, 64) packed latents with noise level sigma (B,)."""
        text_ids = torch.zeros(states.shape[1], 3, device=states.device)
        return self.transformer(
            hidden_states=latents, timestep=sigma, encoder_hidden_states=states, pooled_projections=pooled,
            img_ids=self.image_ids, txt_ids=text_ids, return_dict=False,
        )[0]


def guided(model, latents, sigma, text, empty, guidance):
    """Classifier-free guidance in one doubled batch; text and empty are (states, pooled)."""
    if guidance == 1.0:
        return model.velocity(latents, sigma, *text).float()
    states = torch.cat([empty[0].expand_as(text[0]), text[0]])
    pooled = torch.cat([empty[1].expand_as(text[1]), text[1]])
    without, given = model.velocity(latents.repeat(2, 1, 1), sigma.repeat(2), states, pooled).float().chunk(2)
    return without + guidance * (given - without)


@torch.no_grad()
def sample(model, noise, text, steps, empty=None, guidance=1.0):
    """Euler's method from sigma 1 to 0 in equal steps."""
    latents = noise
    for i in range(steps):
        sigma = torch.full((len(noise),), 1 - i / steps, device=noise.device)
        latents = latents - guided(model, latents, sigma, text, empty, guidance) / steps
    return latents


def pack(latents):
    """(B, 16, h, w) as (B, h/2 * w/2, 64), as FluxPipeline packs them."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(tokens):
    """The inverse of :func:`pack` for square latents."""
    b, n, d = tokens.shape
    side = math.isqrt(n)
    return tokens.reshape(b, side, side, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, side * 2, side * 2)


# -- saving ------------------------------------------------------------------------------------------------------------


def save_model(folder, model, autoencoder):
    """Writes a folder that FluxPipeline.from_pretrained loads; weights in bfloat16.  Tokenizers are there already."""
    folder = Path(folder)
    parts = {"transformer": model.transformer, "vae": autoencoder, "text_encoder": model.clip, "text_encoder_2": model.t5}
    for name, part in parts.items():
        before = next(part.parameters()).dtype
        part.to(torch.bfloat16).save_pretrained(folder / name)
        part.to(before)
        config = json.loads((folder / name / "config.json").read_text())
        config.pop("_name_or_path", None)  # where it was loaded from concerns nobody else
        (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_scheduler().save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })


def round_to_bfloat16(module):
    """Rounds the weights in place to what will be saved."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def count(module):
    return sum(p.numel() for p in module.parameters())
