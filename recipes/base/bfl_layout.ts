/**
 * Black Forest Labs' own layout of FLUX.1's files (github.com/black-forest-labs/flux: `model.py`, `modules/layers.py`,
 * `modules/autoencoder.py`): where diffusers' weights are in it. Layers of one input are one matrix there: q, k and v as
 * `qkv`, with the MLP's up projection as `linear1`; and the last modulation has its shift before its scale.
 */
import type { AutoencoderConfig } from "./autoencoder.ts";
import type { RowRange } from "./component_weights.ts";
import type { TransformerConfig } from "./transformer.ts";

/** A tensor of the file, or some of its rows. */
export interface BflPlace {
  readonly tensor: string;
  readonly rows?: readonly RowRange[];
}

/** Each weight of a transformer (as transformerWeightShapes names them) in `flux1-*.safetensors`. */
export function bflTransformerPlaces(config: TransformerConfig): Map<string, BflPlace> {
  const hidden = config.num_attention_heads * config.attention_head_dim;
  const places = new Map<string, BflPlace>();
  const linear = (module: string, tensor: string, rows?: readonly RowRange[]) => {
    for (const kind of ["weight", "bias"]) {
      places.set(`${module}.${kind}`, { tensor: `${tensor}.${kind}`, ...(rows && { rows }) });
    }
  };
  /** Layers that are one matrix in the file, of `hidden` rows each, the last one of what is said. */
  const joined = (modules: readonly string[], tensor: string, lastRows = hidden) =>
    modules.forEach((module, i) =>
      linear(module, tensor, [[i * hidden, i === modules.length - 1 ? lastRows : hidden]])
    );
  const norms = (module: string, tensor: string, [q, k]: readonly [string, string]) => {
    places.set(`${module}.${q}.weight`, { tensor: `${tensor}.query_norm.scale` });
    places.set(`${module}.${k}.weight`, { tensor: `${tensor}.key_norm.scale` });
  };

  linear("x_embedder", "img_in");
  linear("context_embedder", "txt_in");
  const embedders = [["timestep_embedder", "time_in"], ["text_embedder", "vector_in"]];
  if (config.guidance_embeds) embedders.push(["guidance_embedder", "guidance_in"]);
  for (const [module, tensor] of embedders) {
    linear(`time_text_embed.${module}.linear_1`, `${tensor}.in_layer`);
    linear(`time_text_embed.${module}.linear_2`, `${tensor}.out_layer`);
  }
  for (let layer = 0; layer < config.num_layers; layer++) {
    const [block, from] = [`transformer_blocks.${layer}`, `double_blocks.${layer}`];
    linear(`${block}.norm1.linear`, `${from}.img_mod.lin`);
    linear(`${block}.norm1_context.linear`, `${from}.txt_mod.lin`);
    joined(["to_q", "to_k", "to_v"].map((name) => `${block}.attn.${name}`), `${from}.img_attn.qkv`);
    joined(
      ["add_q_proj", "add_k_proj", "add_v_proj"].map((name) => `${block}.attn.${name}`),
      `${from}.txt_attn.qkv`,
    );
    norms(`${block}.attn`, `${from}.img_attn.norm`, ["norm_q", "norm_k"]);
    norms(`${block}.attn`, `${from}.txt_attn.norm`, ["norm_added_q", "norm_added_k"]);
    linear(`${block}.attn.to_out.0`, `${from}.img_attn.proj`);
    linear(`${block}.attn.to_add_out`, `${from}.txt_attn.proj`);
    for (const [mlp, stream] of [["ff", "img_mlp"], ["ff_context", "txt_mlp"]]) {
      linear(`${block}.${mlp}.net.0.proj`, `${from}.${stream}.0`);
      linear(`${block}.${mlp}.net.2`, `${from}.${stream}.2`);
    }
  }
  for (let layer = 0; layer < config.num_single_layers; layer++) {
    const [block, from] = [`single_transformer_blocks.${layer}`, `single_blocks.${layer}`];
    linear(`${block}.norm.linear`, `${from}.modulation.lin`);
    const modules = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].map((name) => `${block}.${name}`);
    joined(modules, `${from}.linear1`, 4 * hidden);
    norms(`${block}.attn`, `${from}.norm`, ["norm_q", "norm_k"]);
    linear(`${block}.proj_out`, `${from}.linear2`);
  }
  linear("norm_out.linear", "final_layer.adaLN_modulation.1", [[hidden, hidden], [0, hidden]]);
  linear("proj_out", "final_layer.linear");
  return places;
}

/** What the parts of an autoencoder's names are called in `ae.safetensors`. */
const AUTOENCODER_NAMES: readonly (readonly [RegExp, string])[] = [
  [/\bdown_blocks\.(\d+)\.resnets\./, "down.$1.block."],
  [/\bdown_blocks\.(\d+)\.downsamplers\.0\./, "down.$1.downsample."],
  [/\bup_blocks\.(\d+)\.resnets\./, "up.$1.block."],
  [/\bup_blocks\.(\d+)\.upsamplers\.0\./, "up.$1.upsample."],
  [/\bmid_block\.resnets\.0\./, "mid.block_1."],
  [/\bmid_block\.resnets\.1\./, "mid.block_2."],
  [/\bmid_block\.attentions\.0\.group_norm\./, "mid.attn_1.norm."],
  [/\bmid_block\.attentions\.0\.to_out\.0\./, "mid.attn_1.proj_out."],
  [/\bmid_block\.attentions\.0\.to_([qkv])\./, "mid.attn_1.$1."],
  [/\bconv_norm_out\./, "norm_out."],
  [/\bconv_shortcut\./, "nin_shortcut."],
];

/** The name of an autoencoder's weight (as autoencoderWeightShapes has them) in `ae.safetensors`. */
export function bflAutoencoderName(
  name: string,
  { block_out_channels: channels }: AutoencoderConfig,
): string {
  const other = AUTOENCODER_NAMES.reduce(
    (text, [pattern, replacement]) => text.replace(pattern, replacement),
    name,
  );
  // The file counts the decoder's stages from the finest one on.
  return other.replace(
    /^decoder\.up\.(\d+)\./,
    (_, stage) => `decoder.up.${channels.length - 1 - Number(stage)}.`,
  );
}
