/** What `--cache_dit_config` takes: a threshold, or a file of cache-dit's. */
import { InvalidArgumentError } from "@commander-js/extra-typings";
import { load } from "js-yaml";
import { z } from "zod";
import { definedOnly, userPath } from "./base/command_line.ts";
import { messageOf } from "./base/errors.ts";
import type { FirstBlockCacheOptions } from "./09_first_block_cache.ts";

const count = z.int().min(-1).transform((steps) => steps === -1 ? Infinity : steps);

/** The part of cache-dit's DBCacheConfig that the first block cache has; -1 is no limit, as there. */
const keys = z.strictObject({
  cache_type: z.literal("DBCache").optional(),
  Fn_compute_blocks: z.literal(1, { error: "only 1 is supported: the first block decides" }).optional(),
  Bn_compute_blocks: z.literal(0, { error: "only 0 is supported" }).optional(),
  residual_diff_threshold: z.number().min(0).optional(),
  max_warmup_steps: z.int().min(0).optional(),
  max_cached_steps: count.optional(),
  max_continuous_cached_steps: count.optional(),
  enable_taylorseer: z.literal(false, { error: "only false is supported" }).optional(),
});

/**
 * Parses the flag's value, for commander: a number, or the path of a YAML or JSON file with cache-dit's keys.
 *
 * @throws InvalidArgumentError that says what is wrong with the value, or with which key of the file.
 */
export function cacheDitConfig(text: string): FirstBlockCacheOptions {
  if (text.trim() !== "" && Number.isFinite(Number(text))) {
    if (Number(text) < 0) throw new InvalidArgumentError("Give a threshold from 0, mostly 0.05 to 0.2.");
    return { threshold: Number(text) };
  }
  const path = userPath(text);
  let value: unknown;
  try {
    value = load(Deno.readTextFileSync(path));
  } catch (error) {
    const reason = error instanceof Deno.errors.NotFound ? "there is no such file" : messageOf(error);
    throw new InvalidArgumentError(`Give a threshold, e.g. 0.08, or a YAML file; ${path}: ${reason}.`);
  }
  const nested = typeof value === "object" && value !== null && "cache_config" in value;
  const result = nested ? z.strictObject({ cache_config: keys }).safeParse(value) : keys.safeParse(value);
  if (!result.success) {
    const problems = result.error.issues.map(({ path: key, message }) =>
      `${key.join(".") || "the file"}: ${message}`
    );
    throw new InvalidArgumentError(
      `${path} has what the first block cache does not: ${problems.join("; ")}.`,
    );
  }
  const config = "cache_config" in result.data ? result.data.cache_config : result.data;
  return definedOnly({
    threshold: config.residual_diff_threshold,
    warmupSteps: config.max_warmup_steps,
    maxCachedSteps: config.max_cached_steps,
    maxContinuousCachedSteps: config.max_continuous_cached_steps,
  });
}
