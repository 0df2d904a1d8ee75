/** Recipe 09 on the CPU and the emulated GPU; its flag; and what it does to pictures of the embedded model. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { InvalidArgumentError } from "@commander-js/extra-typings";
import { openCpu } from "../../ffi/cpu/open.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { firstBlockCache } from "../../recipes/09_first_block_cache.ts";
import { psnr } from "../../recipes/base/psnr.ts";
import { cacheDitConfig } from "../../recipes/cache_dit_config.ts";
import { draw } from "../support/drawing.ts";
import { firstBlockCacheSuite } from "../support/first_block_cache_suite.ts";
import { inFolder } from "../support/folders.ts";
import { GPU_WITH_ATTENTION } from "../support/gpu_devices.ts";
import { ownDevice, testOn } from "../support/test_device.ts";
import { withGuidedTiny } from "../support/guided_tiny.ts";

const CPU = ownDevice("cpu", () => openCpu());

firstBlockCacheSuite(CPU);
firstBlockCacheSuite(GPU_WITH_ATTENTION, [compile, fuseQkv]);

testOn(
  CPU,
  "models/tiny in 28 steps: the default threshold reuses some and keeps the picture",
  (device) =>
    withGuidedTiny(async (folder) => {
      const options = { prompt: "three red apples on a blue background", seed: 1234, numInferenceSteps: 28 };
      const picture = async (threshold?: number) => {
        const recipes = threshold === undefined ? [] : [firstBlockCache({ threshold })];
        const { result } = await draw(device, folder, [bfloat16, compile, fuseQkv, ...recipes], options);
        return { rgb: result.images[0].rgb, reused: result.reusedSteps?.length ?? 0 };
      };
      const expected = await picture();
      const [careful, usual, bold] = [await picture(0.03), await picture(0.08), await picture(0.2)];
      assert.ok(
        careful.reused <= usual.reused && usual.reused <= bold.reused && bold.reused > careful.reused,
      );
      assert.ok(usual.reused >= 6 && usual.reused <= 20, `${usual.reused} steps were reused`);
      const distance = psnr(usual.rgb, expected.rgb);
      assert.ok(distance >= 40, `PSNR ${distance} dB`);
      assert.ok(psnr(bold.rgb, expected.rgb) < psnr(careful.rgb, expected.rgb));
    }),
);

Deno.test("--cache_dit_config takes a threshold or a file of cache-dit's", () =>
  inFolder(async (folder) => {
    assert.deepEqual(cacheDitConfig("0.12"), { threshold: 0.12 });
    assert.deepEqual(cacheDitConfig("0"), { threshold: 0 });
    const path = join(folder, "config.yaml");
    const parsed = async (text: string) => {
      await Deno.writeTextFile(path, text);
      return cacheDitConfig(path);
    };
    const full = "Fn_compute_blocks: 1 # the first\nBn_compute_blocks: 0\nresidual_diff_threshold: 0.1\n" +
      "max_warmup_steps: 4\nmax_cached_steps: -1\nmax_continuous_cached_steps: 3\n";
    const expected = {
      threshold: 0.1,
      warmupSteps: 4,
      maxCachedSteps: Infinity,
      maxContinuousCachedSteps: 3,
    };
    assert.deepEqual(await parsed(full), expected);
    const nested = `cache_config:\n${full.split("\n").map((line) => `  ${line}`).join("\n")}\n`;
    assert.deepEqual(await parsed(nested), expected);
    assert.deepEqual(await parsed('{ "residual_diff_threshold": 0.2 }'), { threshold: 0.2 });
    const refused: [string, RegExp][] = [
      ["Fn_compute_blocks: 8", /Fn_compute_blocks: only 1 is supported/],
      ["residual_diff_threshold: high", /residual_diff_threshold: /],
      ["max_warmup_steps: -1", /max_warmup_steps: /],
      ["downsample_factor: 2", /downsample_factor/],
      ["a: b: c", /config\.yaml: /],
      ["- 1", /the file: /],
      ["", /config\.yaml: /],
    ];
    for (const [text, message] of refused) {
      await assert.rejects(parsed(text), (error) => {
        assert.ok(error instanceof InvalidArgumentError, `${error}`);
        assert.match(error.message, message);
        return true;
      });
    }
    assert.throws(() => cacheDitConfig(join(folder, "none.yaml")), /none\.yaml: there is no such file/);
    assert.throws(() => cacheDitConfig("-0.1"), /Give a threshold from 0/);
  }));
