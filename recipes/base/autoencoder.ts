import { z } from "zod";
import type { Tensor } from "../../ffi/tensor.ts";
import { MAX_LAYERS } from "./checkpoint.ts";
import type { Ops } from "./ops.ts";
import { dense, denseAll, under, type Weights, WeightShapes } from "./weights.ts";

/** What `vae/config.json` says (diffusers' AutoencoderKL), with its defaults. */
export const autoencoderConfigSchema = z.looseObject({
  in_channels: z.int().positive().default(3),
  out_channels: z.literal(3, { error: "only RGB (3) is supported" }).default(3),
  block_out_channels: z.array(z.int().positive()).min(1).max(10),
  layers_per_block: z.int().positive().max(MAX_LAYERS).default(1),
  latent_channels: z.int().positive().default(4),
  norm_num_groups: z.int().positive().default(32),
  act_fn: z.literal("silu", { error: "only silu is supported" }).default("silu"),
  sample_size: z.int().positive().default(1024),
  scaling_factor: z.number().min(1e-6).max(1e6).default(0.18215),
  shift_factor: z.number().min(-1e6).max(1e6).nullish(),
  use_quant_conv: z.boolean().default(true),
  use_post_quant_conv: z.boolean().default(true),
  mid_block_add_attention: z.boolean().default(true),
  down_block_types: z.array(z.literal("DownEncoderBlock2D")).optional(),
  up_block_types: z.array(z.literal("UpDecoderBlock2D")).optional(),
}).refine(
  (config) => config.block_out_channels.every((channels) => channels % config.norm_num_groups === 0),
  {
    path: ["norm_num_groups"],
    error: "must divide each of block_out_channels",
  },
);

/** What `vae/config.json` says, in diffusers' or transformers' names, with their defaults filled in. */
export interface AutoencoderConfig {
  /** Of pictures to encode. */
  readonly in_channels: number;
  /** RGB. */
  readonly out_channels: 3;
  /** Channels at each resolution, the full one first. */
  readonly block_out_channels: readonly number[];
  /** Residual blocks at each resolution of the encoder; the decoder has one more. */
  readonly layers_per_block: number;
  /** Numbers of a latent. */
  readonly latent_channels: number;
  /** Groups of the group norms. */
  readonly norm_num_groups: number;
  /** Activation. */
  readonly act_fn: "silu";
  /** Side of the pictures that it was made for. */
  readonly sample_size: number;
  /** Latents are `(z - shift_factor) * scaling_factor`. */
  readonly scaling_factor: number;
  /** See `scaling_factor`; 0 when left out. */
  readonly shift_factor?: number | null | undefined;
  /** Whether a 1 x 1 convolution stands behind the encoder. */
  readonly use_quant_conv: boolean;
  /** Whether a 1 x 1 convolution stands before the decoder. */
  readonly use_post_quant_conv: boolean;
  /** Whether the middle block attends. */
  readonly mid_block_add_attention: boolean;
  /** Of the encoder, one for each resolution. */
  readonly down_block_types?: readonly "DownEncoderBlock2D"[] | undefined;
  /** Of the decoder, one for each resolution. */
  readonly up_block_types?: readonly "UpDecoderBlock2D"[] | undefined;
}

const NORM_EPS = 1e-6;
const SAME: readonly [number, number, number, number] = [1, 1, 1, 1];

/** Picture pixels to one latent pixel, in each direction. */
export function spatialFactor(config: AutoencoderConfig): number {
  return 2 ** (config.block_out_channels.length - 1);
}

/**
 * Latents to a picture (Kingma & Welling 2013; Rombach et al. 2022; diffusers' `AutoencoderKL.decode`). Takes the
 * transformer's latents: scaling and shift are undone here. One picture after another, since a picture at full
 * resolution is what takes the most memory of all.
 *
 * @param latents `[batch, latent_channels, height, width]`.
 * @returns `[batch, 3, factor height, factor width]`, dense, about -1..1, in the weights' dtype.
 */
export function decode(config: AutoencoderConfig, weights: Weights, ops: Ops, latents: Tensor): Tensor {
  const [batch] = latents.shape;
  return latents.device.scope(() =>
    batch === 1 ? decodeOne(config, weights, ops, latents) : ops.concat(
      Array.from({ length: batch }, (_, i) => decodeOne(config, weights, ops, latents.narrow(0, i, 1))),
      0,
    )
  );
}

function decodeOne(config: AutoencoderConfig, weights: Weights, ops: Ops, latents: Tensor): Tensor {
  const decoder = under(weights, "decoder");
  const { dtype } = decoder.get("conv_in.weight");
  return latents.device.scope(() => {
    let x = ops.cast(ops.scaleShift(latents, 1 / config.scaling_factor, config.shift_factor ?? 0), dtype);
    if (config.use_post_quant_conv) x = conv(ops, weights, "post_quant_conv", x);
    x = conv(ops, decoder, "conv_in", x, SAME);
    x = replace(x, (y) => midBlock(config, under(decoder, "mid_block"), ops, y));
    for (let stage = 0; stage < config.block_out_channels.length; stage++) {
      const block = under(decoder, `up_blocks.${stage}`);
      for (let layer = 0; layer <= config.layers_per_block; layer++) {
        x = replace(x, (y) => resnet(config, under(block, `resnets.${layer}`), ops, y));
      }
      if (stage < config.block_out_channels.length - 1) {
        const { weight, bias } = convolutionOf(block, "upsamplers.0.conv");
        x = replace(x, (y) => ops.upsampleConv(y, weight, bias, ops));
      }
    }
    // Convolutions may leave the channels last in memory.
    return ops.contiguous(normConv(config, decoder, ops, "conv_norm_out", "conv_out", x));
  });
}

/**
 * A picture to its latents' distribution: the mode, which is the mean (diffusers' `AutoencoderKL.encode(...).mode()`,
 * then shift and scaling as FluxPipeline applies them).
 *
 * @param image `[batch, 3, height, width]`, -1..1.
 * @returns the transformer's latents, `[batch, latent_channels, height / factor, width / factor]`.
 */
export function encode(config: AutoencoderConfig, weights: Weights, ops: Ops, image: Tensor): Tensor {
  return image.device.scope(() => {
    const mean = ops.contiguous(
      encodeMoments(config, weights, ops, image).narrow(1, 0, config.latent_channels),
    );
    const { scaling_factor: scale, shift_factor: shift } = config;
    return ops.scaleShift(mean, scale, -(shift ?? 0) * scale);
  });
}

/** Mean and log-variance of the latents, `[batch, 2 latent_channels, ...]`, neither shifted nor scaled. */
export function encodeMoments(config: AutoencoderConfig, weights: Weights, ops: Ops, image: Tensor): Tensor {
  const encoder = under(weights, "encoder");
  const { dtype } = encoder.get("conv_in.weight");
  return image.device.scope(() => {
    let x = conv(ops, encoder, "conv_in", ops.cast(image, dtype), SAME);
    for (let stage = 0; stage < config.block_out_channels.length; stage++) {
      const block = under(encoder, `down_blocks.${stage}`);
      for (let layer = 0; layer < config.layers_per_block; layer++) {
        x = replace(x, (y) => resnet(config, under(block, `resnets.${layer}`), ops, y));
      }
      if (stage < config.block_out_channels.length - 1) {
        // Padded only behind the last row and column, so that each output pixel covers its own four.
        x = replace(x, (y) => conv(ops, block, "downsamplers.0.conv", y, [0, 0, 1, 1], 2));
      }
    }
    x = replace(x, (y) => midBlock(config, under(encoder, "mid_block"), ops, y));
    const moments = normConv(config, encoder, ops, "conv_norm_out", "conv_out", x);
    return config.use_quant_conv ? conv(ops, weights, "quant_conv", moments) : moments;
  });
}

/** Runs a stage and frees its input, which at full resolution is what fills the memory. */
function replace(x: Tensor, stage: (x: Tensor) => Tensor): Tensor {
  const next = x.device.scope(() => stage(x));
  x.dispose();
  return next;
}

function conv(
  ops: Ops,
  weights: Weights,
  module: string,
  x: Tensor,
  padding: readonly [number, number, number, number] = [0, 0, 0, 0],
  stride = 1,
): Tensor {
  const { weight, bias } = convolutionOf(weights, module);
  return ops.conv2d(x, weight, bias, { padding, stride });
}

function convolutionOf(weights: Weights, module: string): { weight: Tensor; bias: Tensor } {
  return { weight: weights.get(`${module}.weight`), bias: weights.get(`${module}.bias`) };
}

/** Group norm, SiLU and a 3 x 3 convolution; the normed picture is freed at once. */
function normConv(
  config: AutoencoderConfig,
  weights: Weights,
  ops: Ops,
  norm: string,
  convolution: string,
  x: Tensor,
): Tensor {
  return x.device.scope(() => conv(ops, weights, convolution, normed(config, weights, ops, norm, x), SAME));
}

function normed(config: AutoencoderConfig, weights: Weights, ops: Ops, norm: string, x: Tensor): Tensor {
  const [weight, bias] = [weights.get(`${norm}.weight`), weights.get(`${norm}.bias`)];
  return ops.groupNormSilu(x, config.norm_num_groups, weight, bias, NORM_EPS);
}

/** Two convolutions and a residual connection, through a 1 x 1 convolution where the channels change. */
function resnet(config: AutoencoderConfig, weights: Weights, ops: Ops, x: Tensor): Tensor {
  return x.device.scope(() => {
    const middle = normConv(config, weights, ops, "norm1", "conv1", x);
    const y = replace(middle, (z) => normed(config, weights, ops, "norm2", z));
    const residual = weights.has("conv_shortcut.weight") ? conv(ops, weights, "conv_shortcut", x) : x;
    const { weight, bias } = convolutionOf(weights, "conv2");
    return ops.conv2dAdd(y, weight, bias, residual, { padding: SAME }, ops);
  });
}

function midBlock(config: AutoencoderConfig, weights: Weights, ops: Ops, x: Tensor): Tensor {
  return x.device.scope(() => {
    let y = resnet(config, under(weights, "resnets.0"), ops, x);
    if (config.mid_block_add_attention) y = selfAttention(config, under(weights, "attentions.0"), ops, y);
    return resnet(config, under(weights, "resnets.1"), ops, y);
  });
}

/** Attention of all pixels to all pixels with a single head as wide as the channels. */
function selfAttention(config: AutoencoderConfig, weights: Weights, ops: Ops, x: Tensor): Tensor {
  const [batch, channels, height, width] = x.shape;
  return x.device.scope(() => {
    const normed = ops.groupNorm(
      x,
      config.norm_num_groups,
      weights.get("group_norm.weight"),
      weights.get("group_norm.bias"),
      NORM_EPS,
    );
    const tokens = ops.contiguous(normed.reshape([batch, channels, height * width]).permute([0, 2, 1]));
    const [q, k, v] = denseAll(ops, weights, ["to_q", "to_k", "to_v"], tokens).map((y) =>
      y.reshape([batch, height * width, 1, channels])
    );
    const attended = dense(ops, weights, "to_out.0", ops.attention(q, k, v).reshape(tokens.shape));
    return ops.add(x, attended.permute([0, 2, 1]).reshape(x.shape));
  });
}

/** Names and shapes of the weights that {@link decode} and {@link encode} read. */
export function autoencoderWeightShapes(config: AutoencoderConfig): WeightShapes {
  const { block_out_channels: channels, layers_per_block: layers, latent_channels: latent } = config;
  const shapes = new WeightShapes();
  const last = channels.length - 1;

  const resnetShapes = (module: string, from: number, to: number) => {
    shapes.norm(`${module}.norm1`, from).conv(`${module}.conv1`, to, from, 3);
    shapes.norm(`${module}.norm2`, to).conv(`${module}.conv2`, to, to, 3);
    if (from !== to) shapes.conv(`${module}.conv_shortcut`, to, from, 1);
  };
  const midShapes = (module: string) => {
    for (const i of [0, 1]) resnetShapes(`${module}.resnets.${i}`, channels[last], channels[last]);
    if (!config.mid_block_add_attention) return;
    shapes.norm(`${module}.attentions.0.group_norm`, channels[last]);
    for (const name of ["to_q", "to_k", "to_v", "to_out.0"]) {
      shapes.linear(`${module}.attentions.0.${name}`, channels[last], channels[last]);
    }
  };

  shapes.conv("encoder.conv_in", channels[0], config.in_channels, 3);
  channels.forEach((to, stage) => {
    const block = `encoder.down_blocks.${stage}`;
    const from = channels[Math.max(stage - 1, 0)];
    for (let layer = 0; layer < layers; layer++) {
      resnetShapes(`${block}.resnets.${layer}`, layer === 0 ? from : to, to);
    }
    if (stage < last) shapes.conv(`${block}.downsamplers.0.conv`, to, to, 3);
  });
  midShapes("encoder.mid_block");
  shapes.norm("encoder.conv_norm_out", channels[last]).conv(
    "encoder.conv_out",
    2 * latent,
    channels[last],
    3,
  );

  shapes.conv("decoder.conv_in", channels[last], latent, 3);
  midShapes("decoder.mid_block");
  channels.toReversed().forEach((to, stage, widths) => {
    const block = `decoder.up_blocks.${stage}`;
    const from = widths[Math.max(stage - 1, 0)];
    for (let layer = 0; layer <= layers; layer++) {
      resnetShapes(`${block}.resnets.${layer}`, layer === 0 ? from : to, to);
    }
    if (stage < last) shapes.conv(`${block}.upsamplers.0.conv`, to, to, 3);
  });
  shapes.norm("decoder.conv_norm_out", channels[0]).conv(
    "decoder.conv_out",
    config.out_channels,
    channels[0],
    3,
  );

  if (config.use_quant_conv) shapes.conv("quant_conv", 2 * latent, 2 * latent, 1);
  if (config.use_post_quant_conv) shapes.conv("post_quant_conv", latent, latent, 1);
  return shapes;
}
