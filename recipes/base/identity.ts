import { createHash } from "node:crypto";
import { join } from "node:path";
import { listComponent, readText } from "./checkpoint.ts";
import { COMPONENTS } from "./plan.ts";
import type { PartFiles } from "./single_file.ts";

/**
 * What tells a model's weights from others, and from what they were before, without reading them: size and time of the
 * last change of each file, and what the configs say. A file that is copied may count as another one, and a file that is
 * changed without a trace in either as the same.
 *
 * @param folder of the model. @param random whether its weights are made up: then only the configs count.
 * @param files in the place of parts of the folder.
 * @returns a text for each file, by its path in the folder.
 * @throws ModelError for a folder that cannot be read.
 */
export function identityOf(folder: string, random: boolean, files: PartFiles = {}): Record<string, string> {
  const entries: Record<string, string> = random ? { weights: "random" } : {};
  for (const component of COMPONENTS) {
    const single = component === "transformer" || component === "vae" ? files[component] : undefined;
    if (single !== undefined) {
      entries[`${component}'s file`] = changeOf(single);
      continue;
    }
    for (const name of listComponent(folder, component)) {
      const file = `${component}/${name}`;
      if (name === "config.json") entries[file] = digestOf(readText(folder, file));
      if (random || !/\.safetensors(\.index\.json)?$/.test(name)) continue;
      entries[file] = changeOf(join(folder, file));
    }
  }
  return entries;
}

function changeOf(path: string): string {
  const { size, mtime } = Deno.statSync(path);
  return `${size} bytes of ${mtime?.toISOString()}`;
}

function digestOf(text: string): string {
  return createHash("sha256").update(text).digest("hex").slice(0, 16);
}
