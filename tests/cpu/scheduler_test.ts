/** The schedule: diffusers' float32 arrays (tests/golden/scheduler.json), then properties. */

import assert from "node:assert/strict";
import fc from "fast-check";
import { FlowMatchEulerScheduler, schedulerConfigSchema } from "../../recipes/base/scheduler.ts";
import { UsageError } from "../../recipes/base/errors.ts";

const schedulerOf = (config: unknown) => new FlowMatchEulerScheduler(schedulerConfigSchema.parse(config));

interface Case {
  note: string;
  config: Record<string, unknown>;
  num_inference_steps: number | null;
  given_sigmas: number[] | null;
  image_seq_len: number | null;
  mu: number | null;
  sigmas: number[];
  timesteps: number[];
}

Deno.test("sigmas: diffusers' float32 values, bit for bit", () => {
  const path = new URL("../golden/scheduler.json", import.meta.url);
  const { cases } = JSON.parse(Deno.readTextFileSync(path)) as { cases: Case[] };
  // FluxPipeline always passes sigmas, so the scheduler's own spacing is not ours to reproduce.
  const ours = cases.filter(({ note }) => note !== "scheduler's own");
  assert.ok(ours.length >= 20);
  for (const one of ours) {
    const scheduler = schedulerOf(one.config);
    const steps = one.num_inference_steps ?? one.given_sigmas!.length;
    const imageSequenceLength = one.image_seq_len ?? 4096;
    const custom = one.given_sigmas === null ? {} : { sigmas: one.given_sigmas };
    const { sigmas, timesteps } = scheduler.sigmas(steps, { imageSequenceLength, ...custom });
    const what = `${one.note}, ${JSON.stringify(one.config)}, ${steps} steps, ${one.image_seq_len} tokens`;
    assert.deepEqual(sigmas, Float32Array.from(one.sigmas), what);
    assert.deepEqual(timesteps, Float32Array.from(one.timesteps), what);
    if (one.mu !== null) assert.equal(scheduler.mu(imageSequenceLength), one.mu, what);
  }
});

const anyConfig = fc.record({
  shift: fc.double({ min: 0.1, max: 10, noNaN: true }),
  use_dynamic_shifting: fc.boolean(),
  time_shift_type: fc.constantFrom("exponential", "linear"),
});
const anySteps = fc.integer({ min: 1, max: 200 });
const anyLength = fc.integer({ min: 1, max: 16384 });

Deno.test("sigmas: from 1 down to 0, never up, inside [0, 1]", () => {
  fc.assert(fc.property(anyConfig, anySteps, anyLength, (config, steps, imageSequenceLength) => {
    const { sigmas, timesteps } = schedulerOf(config).sigmas(steps, { imageSequenceLength });
    assert.equal(sigmas.length, steps + 1);
    assert.equal(timesteps.length, steps);
    assert.ok(Math.abs(sigmas[0] - 1) <= 1e-6);
    assert.equal(sigmas[steps], 0);
    for (let i = 0; i < steps; i++) {
      assert.ok(sigmas[i] > sigmas[i + 1] && sigmas[i] <= 1 + 1e-6, `${sigmas}`);
      assert.equal(timesteps[i], Math.fround(sigmas[i] * 1000));
    }
  }));
});

Deno.test("sigmas: custom ones are shifted each for itself, in any order", () => {
  const sigma = fc.float({ min: 0, max: 1, noNaN: true });
  fc.assert(fc.property(
    anyConfig,
    anyLength,
    fc.array(sigma, { minLength: 1, maxLength: 20 }),
    fc.integer(),
    (config, imageSequenceLength, custom, turn) => {
      const scheduler = schedulerOf(config);
      const shift = (sigmas: number[]) =>
        scheduler.sigmas(sigmas.length, { imageSequenceLength, sigmas }).sigmas;
      const by = Math.abs(turn) % custom.length;
      const turned = [...custom.slice(by), ...custom.slice(0, by)];
      const shifted = [...shift(custom)];
      const last = shifted.pop();
      assert.equal(last, 0);
      assert.deepEqual([...shift(turned)], [...shifted.slice(by), ...shifted.slice(0, by), 0]);
      for (let i = 0; i < custom.length; i++) {
        assert.equal(shift([custom[i]])[0], shifted[i]);
        assert.ok(shifted[i] >= 0 && shifted[i] <= 1 + 1e-6);
      }
    },
  ));
});

Deno.test("sigmas: more image tokens mean more noise for longer", () => {
  const scheduler = schedulerOf({ use_dynamic_shifting: true });
  fc.assert(fc.property(anySteps, anyLength, anyLength, (steps, a, b) => {
    const small = scheduler.sigmas(steps, { imageSequenceLength: Math.min(a, b) }).sigmas;
    const large = scheduler.sigmas(steps, { imageSequenceLength: Math.max(a, b) }).sigmas;
    small.forEach((sigma, i) => assert.ok(sigma <= large[i] + 1e-7));
  }));
  assert.ok(Math.abs(scheduler.mu(256) - 0.5) <= 1e-12);
  assert.ok(Math.abs(scheduler.mu(4096) - 1.15) <= 1e-12);
});

Deno.test("scheduler: a shift of 1 changes nothing", () => {
  const { sigmas } = schedulerOf({}).sigmas(4, { imageSequenceLength: 1 });
  assert.deepEqual([...sigmas], [1, 0.75, 0.5, 0.25, 0]);
});

Deno.test("scheduler: unsupported and damaged configs are refused by field, unknown keys are not", () => {
  const refused: [unknown, string[]][] = [
    [{ use_karras_sigmas: true }, ["use_karras_sigmas"]],
    [{ use_exponential_sigmas: true }, ["use_exponential_sigmas"]],
    [{ use_beta_sigmas: true }, ["use_beta_sigmas"]],
    [{ stochastic_sampling: true }, ["stochastic_sampling"]],
    [{ invert_sigmas: true }, ["invert_sigmas"]],
    [{ shift_terminal: 0.1 }, ["shift_terminal"]],
    [{ time_shift_type: "cubic" }, ["time_shift_type"]],
    [{ _class_name: "DDIMScheduler" }, ["_class_name"]],
    [{ shift: "3", num_train_timesteps: 0 }, ["num_train_timesteps", "shift"]],
    [{ base_image_seq_len: 4096 }, ["max_image_seq_len"]],
    [null, [""]],
  ];
  for (const [config, fields] of refused) {
    const { error } = schedulerConfigSchema.safeParse(config);
    assert.deepEqual(error?.issues.map(({ path }) => path.join(".")), fields, JSON.stringify(config));
  }
  schedulerOf({ _diffusers_version: "0.30", shift_terminal: null, use_karras_sigmas: false });
});

Deno.test("sigmas: wrong steps, lengths and custom values are usage errors", () => {
  const scheduler = schedulerOf({});
  const imageSequenceLength = 16;
  for (const steps of [0, -1, 1.5, NaN]) {
    assert.throws(() => scheduler.sigmas(steps, { imageSequenceLength }), UsageError);
  }
  assert.throws(() => scheduler.sigmas(1, { imageSequenceLength: 0 }), UsageError);
  for (const sigmas of [[1], [1, 0.5, 0.2], [1, NaN], [1.5, 0.5], [1, -0.1]]) {
    assert.throws(() => scheduler.sigmas(2, { imageSequenceLength, sigmas }), UsageError);
  }
});
