import type { DiskCache } from "../cache.ts";
import { FfiError, messageOf } from "../errors.ts";

/** Turns WebAssembly text into a binary module; see {@link loadAssembler}. */
export interface Assembler {
  /** Whether fused multiply-add of vectors is there (relaxed SIMD), else it is a multiplication and an addition. */
  readonly relaxed: boolean;
  /** Bytes of the module that `text` describes. Throws {@link FfiError} with the assembler's words, `name` and line. */
  assemble(name: string, text: string): Uint8Array<ArrayBuffer>;
}

/**
 * Loads the assembler (npm's wabt, ~50 ms) on first call and keeps it. It asks for no permission itself. With a
 * cache, modules that were assembled before are read from there.
 *
 * Kernels are written with `f32x4.relaxed_madd`, always with a plain `local.get` as its last operand (the addend).
 * Where the engine lacks relaxed SIMD that pair of instructions becomes `f32x4.mul`, `local.get`, `f32x4.add`.
 */
export async function loadAssembler(cache?: DiskCache): Promise<Assembler> {
  loaded ??= load(supportsRelaxedSimd());
  const { relaxed, assemble } = await loaded;
  if (cache === undefined) return { relaxed, assemble };
  return {
    relaxed,
    assemble: (name, text) =>
      cache.get(["wasm", WABT_VERSION, String(relaxed), text], () => assemble(name, text)),
  };
}

/** Part of the cache's keys: another version may assemble other bytes. Keep it that of deno.json. */
const WABT_VERSION = "1.0.39";

let loaded: Promise<Assembler> | undefined;

/** As {@link loadAssembler}, with or without relaxed SIMD as told: for tests of the fallback. */
export async function load(relaxed: boolean): Promise<Assembler> {
  const { default: wabt } = await import("wabt");
  const toolkit = await wabt();
  return {
    relaxed,
    assemble(name, text) {
      try {
        const module = toolkit.parseWat(name, relaxed ? text : withoutRelaxedSimd(text), {
          simd: true,
          threads: true,
          bulk_memory: true,
          relaxed_simd: relaxed,
        });
        try {
          module.resolveNames();
          return new Uint8Array(module.toBinary({}).buffer);
        } finally {
          module.destroy();
        }
      } catch (cause) {
        throw new FfiError(`${name} does not assemble: ${messageOf(cause)}`, {
          cause,
        });
      }
    },
  };
}

function withoutRelaxedSimd(text: string): string {
  return text.replaceAll(/(local\.get \$\w+) f32x4\.relaxed_madd/g, "f32x4.mul $1 f32x4.add");
}

/** Whether this engine takes `f32x4.relaxed_madd`. */
export function supportsRelaxedSimd(): boolean {
  // (func (param v128) (result v128) local.get 0 local.get 0 local.get 0 f32x4.relaxed_madd), in binary.
  return WebAssembly.validate(
    // deno-fmt-ignore
    new Uint8Array([
      0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 1, 6, 1, 0x60, 1, 0x7b, 1, 0x7b, 3, 2, 1, 0,
      10, 13, 1, 11, 0, 0x20, 0, 0x20, 0, 0x20, 0, 0xfd, 0x85, 2, 0x0b,
    ]),
  );
}
