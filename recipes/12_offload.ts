/**
 * 12 offload: the text encoders leave the GPU when the text is encoded.
 *
 * Idea: T5 has 9.5 GB of weights (5.9 in float8, 4.8 with `--t5_float8 weights`) that are used once for each prompt, while the transformer
 * needs the memory for all steps. They lie in page-locked memory of the host, from where the bus brings them in some 0.2 s,
 * and on the GPU only while they encode.
 * Changes: CLIP's and T5's weights are copied to the GPU before each runs, and their memory is given back behind it. They come back
 * to the same addresses, so that their graphs stay what they are; where there is no room for them, all graphs are given up, and
 * recorded again when they are needed. Exact: yes. The model is loaded piece by piece
 * (base/pieces.ts), each piece as the other recipes want it before the next one comes: the GPU never has to hold the checkpoint.
 * In float8 FLUX.1-dev's transformer takes 12 GB, so that it runs on a GPU of 24.
 * Measured on an H100: a prompt costs 0.15 to 0.24 s more, by how T5 is kept.
 * Off unless `--offload` asks for it. No exported model is written or used with it.
 *
 *     deno run -A recipes/12_offload.ts --device cuda --ckpt FLUX.1-dev --verbose
 */
import { depositOf, whilePresent } from "./base/deposits.ts";
import { UsageError } from "./base/errors.ts";
import type { Component, Plan, Recipe } from "./base/plan.ts";

/** The parts that come and go. */
export const OFFLOADED: readonly Component[] = ["text_encoder", "text_encoder_2"];

/** For models that were loaded in pieces with {@link OFFLOADED} deposited. */
export const offload: Recipe = {
  name: "12_offload",
  exact: true,
  devices: ["cuda", "hip"],
  deposits: OFFLOADED,
  apply: (plan: Plan) => {
    const deposits = new Map(OFFLOADED.map((part) => [part as string, depositOf(plan.weights[part])]));
    for (const [part, deposit] of deposits) {
      if (deposit !== undefined) continue;
      throw new UsageError(`12_offload: the ${part} was not loaded for it`, {
        hint: "load the model with pieces: piecesFor(recipes), and compose the same recipes",
      });
    }
    const { execute, forget } = plan;
    return {
      ...plan,
      execute: (running, part, inputs, body) =>
        whilePresent(
          deposits.get(part),
          () => forget?.(running),
          () => execute(running, part, inputs, body),
        ),
    };
  },
};

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(offload.name));
