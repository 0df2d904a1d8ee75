import { join } from "node:path";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import { SafetensorsFile, writeSafetensors } from "../../recipes/base/safetensors.ts";
import { TIME_CHANNELS } from "../../recipes/base/modulations.ts";
import { copyFolder, editJson, inFolder } from "./folders.ts";

/**
 * Runs `body` with the folder of the embedded model as one with guidance: its guidance embedding is zero, so that it draws
 * what it draws. What is for FLUX.1-dev only can so be tried on a model that draws pictures.
 */
export function withGuidedTiny(body: (folder: string) => Promise<void>): Promise<void> {
  return inFolder(async (root) => {
    const folder = join(root, "guided-tiny");
    copyFolder(EMBEDDED_MODEL, folder);
    editJson(join(folder, "transformer/config.json"), { guidance_embeds: true });
    const path = join(folder, "transformer/diffusion_pytorch_model.safetensors");
    using file = SafetensorsFile.open(path);
    const kept = file.names.map((name) => {
      const { dtype, shape } = file.info(name);
      return { name, dtype, shape, bytes: file.bytes(name).slice() };
    });
    const [hidden] = file.info("x_embedder.bias").shape;
    const zeros = (name: string, shape: number[]) => ({
      name: `time_text_embed.guidance_embedder.${name}`,
      dtype: "bf16" as const,
      shape,
      bytes: new Uint8Array(2 * shape.reduce((a, b) => a * b)),
    });
    await writeSafetensors(path, [
      ...kept,
      zeros("linear_1.weight", [hidden, TIME_CHANNELS]),
      zeros("linear_1.bias", [hidden]),
      zeros("linear_2.weight", [hidden, hidden]),
      zeros("linear_2.bias", [hidden]),
    ]);
    await body(folder);
  });
}
