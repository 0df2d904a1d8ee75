/** The studio's engine on a GPU: two configurations, each with a device of its own, kept loaded at the same time. */
import assert from "node:assert/strict";
import { defaultCacheDir } from "../../recipes/base/command_line.ts";
import { Engine } from "../../recipes/studio/engine.ts";
import type { StudioEvent } from "../../recipes/studio/request.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { testOn } from "../support/test_device.ts";

testOn(TEST_GPU, "studio: two configurations are drawn, compared, and drawn again", async () => {
  const notes: string[] = [];
  using engine = new Engine({ device: "cuda", cacheDir: defaultCacheDir() }, (note) => notes.push(note));
  const all = engine.offer().recipes.filter(({ usual }) => usual).map(({ name }) => name);
  assert.ok(all.includes("05_flash_attention"));
  const draw = async () => {
    const events: StudioEvent[] = [];
    const drawing = { prompt: "a red apple", seed: "7", width: 256, height: 256, model: "tiny" };
    const configurations = [["01_bfloat16"], all];
    await engine.draw(
      { ...drawing, configurations },
      new AbortController().signal,
      (event) => events.push(event),
    );
    return events;
  };
  const pictures = (events: StudioEvent[]) => events.filter((event) => event.type === "picture");
  const first = await draw();
  assert.equal(first.filter(({ type }) => type === "step").length, 2 * 5);
  assert.equal(pictures(first).length, 2);
  const done = first.at(-1)!;
  assert.ok(
    done.type === "done" && (done.comparison!.equal || done.comparison!.psnr! > 20),
    JSON.stringify(done),
  );
  const again = await draw();
  assert.deepEqual(pictures(again).map(({ png }) => png), pictures(first).map(({ png }) => png));
});
