/** Kernels that change while a model stays loaded, on any GPU. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { CompileError } from "../../ffi/errors.ts";
import type { GpuDevice } from "../../ffi/gpu.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan } from "../../recipes/base/plan.ts";
import { failureText, LiveDrawing } from "../../recipes/live_drawing.ts";
import { inFolder } from "./folders.ts";
import { goldenPath } from "./golden.ts";
import { ROOT } from "./programs.ts";
import { type TestDevice, testOn } from "./test_device.ts";

const KERNELS = join(ROOT, "kernels");
const original = (name: string) => Deno.readTextFileSync(join(KERNELS, name));

/** @param seconds that a changed kernel may take to its picture, where that says something. */
export function liveDrawingSuite(gpu: TestDevice<GpuDevice>, seconds = Infinity): void {
  testOn(
    gpu,
    "a changed kernel draws another picture, with the model kept loaded",
    (device) =>
      inFolder(async (folder) => {
        using model = await Model.load(goldenPath("schnell-like"), device);
        const plan = compose(eagerPlan(device, model.weights), bfloat16, compile);
        const size = { height: 32, width: 32, maxSequenceLength: 16 };
        const drawing = { prompt: "a red apple", seed: 1, numInferenceSteps: 1, ...size };
        const live = new LiveDrawing(new FluxPipeline(model, plan), drawing);
        /** Writes a file as an editor would, and takes it in. */
        const change = (name: string, text: string) => {
          const path = join(folder, name);
          Deno.writeTextFileSync(path, text);
          return live.reload(path);
        };
        const edited = (name: string, from: string, to: string) => {
          const text = original(name);
          assert.ok(text.includes(from), `${name} has no ${from}`);
          return change(name, text.replace(from, to));
        };
        try {
          const first = await live.draw();
          assert.equal(first.closeness, undefined);
          assert.equal((await live.draw()).closeness, Infinity, "nothing changed");
          assert.equal(change("to_pixels.cu", original("to_pixels.cu")), false, "the same text is no change");
          assert.equal(live.reload(join(folder, "gone.cu")), false);

          // A kernel outside of all graphs.
          assert.ok(edited("to_pixels.cu", "(unsigned char)(int)rint(", "255 - (unsigned char)(int)rint("));
          const inverted = await live.draw();
          assert.deepEqual(inverted.images[0].rgb, first.images[0].rgb.map((value) => 255 - value));
          assert.ok(change("to_pixels.cu", original("to_pixels.cu")));
          assert.deepEqual((await live.draw()).images, first.images);

          // One that was recorded in the step's graph.
          assert.ok(edited("euler_step.cu", "fmaf(step, v, x)", "fmaf(0.5f * step, v, x)"));
          const start = performance.now();
          const halved = await live.draw();
          const took = (performance.now() - start) / 1000;
          assert.ok(took < seconds, `${took} s`);
          assert.ok(halved.closeness! < 40, `${halved.closeness} dB: the old kernel was replayed`);
          assert.ok(change("euler_step.cu", original("euler_step.cu")));
          assert.deepEqual((await live.draw()).images, first.images);

          // A mistake: the log names the file and its own line. The next change goes on.
          const line = original("euler_step.cu").split("\n").findIndex((text) =>
            text.includes("float step")
          ) + 1;
          assert.ok(edited("euler_step.cu", "float step = *dt;", "float step = *nothing;"));
          await assert.rejects(live.draw(), (error) => {
            assert.ok(error instanceof CompileError);
            assert.match(error.log, new RegExp(`euler_step\\.cu[(:]${line}[):].*error.*nothing`, "s"));
            assert.equal(failureText(error), error.log);
            return true;
          });
          assert.ok(change("euler_step.cu", original("euler_step.cu")));
          assert.deepEqual((await live.draw()).images, first.images);

          // A header is in all files.
          assert.ok(change("common.cuh", `${original("common.cuh")}\n#error a header of mine\n`));
          await assert.rejects(live.draw(), /a header of mine/);
          assert.ok(change("common.cuh", original("common.cuh")));
          assert.deepEqual((await live.draw()).images, first.images);
        } finally {
          for (const name of ["to_pixels.cu", "euler_step.cu", "common.cuh"]) change(name, original(name));
        }
      }),
  );
}
