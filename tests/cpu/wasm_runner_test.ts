import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { supportsRelaxedSimd } from "../../ffi/cpu/assembler.ts";
import type { CpuDevice } from "../../ffi/cpu/device.ts";
import { openCpu } from "../../ffi/cpu/open.ts";
import type { WasmRunner } from "../../ffi/cpu/runner.ts";

/** Adds up to $spins for each job at $out + 4 * job, and the thread's scratch offset at $who + 4 * job. */
const WAT = `(module
  (import "env" "memory" (memory 1 65536 shared))
  (import "env" "scratch" (global $scratch i32))
  (func (export "note") (param $job i32) (param $out i32) (param $who i32) (param $spins i32) (param $scale f32)
    (local $i i32)
    (loop $again
      (i32.store (global.get $scratch) (local.get $i))
      (br_if $again (i32.lt_s (local.tee $i (i32.add (local.get $i) (i32.const 1))) (local.get $spins))))
    (f32.store (i32.add (local.get $out) (i32.shl (local.get $job) (i32.const 2)))
      (f32.mul (local.get $scale) (f32.convert_i32_s (local.get $job))))
    (i32.store (i32.add (local.get $who) (i32.shl (local.get $job) (i32.const 2))) (global.get $scratch)))
  (func (export "trap") (param $job i32) (param $at i32)
    (if (i32.eq (local.get $job) (local.get $at)) (then unreachable)))
)`;

async function withRunner(
  threads: number,
  body: (runner: WasmRunner, device: CpuDevice) => void | Promise<void>,
) {
  using device = await openCpu({ provider: "wasm", threads });
  const { runner } = device;
  assert.ok(runner !== undefined);
  await runner.warm();
  await body(runner, device);
}

function note(runner: WasmRunner, device: CpuDevice, jobs: number, spins: number): Set<number> {
  const out = device.alloc(jobs * 4);
  const who = device.alloc(jobs * 4);
  new Uint8Array(out.buffer, out.byteOffset, jobs * 4).fill(0xff);
  runner.run(runner.module("note.wat", WAT).note, jobs, [out.byteOffset, who.byteOffset, spins, 0.1]);
  const values = new Float32Array(out.buffer, out.byteOffset, jobs);
  for (let job = 0; job < jobs; job++) assert.equal(values[job], Math.fround(Math.fround(0.1) * job));
  const threads = new Set(new Int32Array(who.buffer, who.byteOffset, jobs));
  device.free(out);
  device.free(who);
  return threads;
}

Deno.test("WasmRunner: every job runs once, and workers take part with scratch of their own", async () => {
  await withRunner(3, (runner, device) => {
    const seen = new Set<number>();
    // A worker may get no turn in one run on a busy machine.
    for (let run = 0; run < 200 && seen.size < 3; run++) {
      for (const thread of note(runner, device, 64, 100_000)) seen.add(thread);
    }
    assert.equal(seen.size, 3);
  });
});

Deno.test("WasmRunner: ten thousand rounds of small jobs in a row", async () => {
  await withRunner(4, (runner, device) => {
    for (let round = 0; round < 10_000; round++) note(runner, device, 1 + round % 7, round % 50);
  });
});

Deno.test("WasmRunner: one thread does it all", async () => {
  await withRunner(1, (runner, device) => {
    assert.equal(note(runner, device, 100, 10).size, 1);
    assert.equal(runner.threads, 1);
    assert.match(runner.description, /1 thread$/);
  });
});

Deno.test("WasmRunner: memory that grew after the workers started is theirs too", async () => {
  await withRunner(3, (runner, device) => {
    const big = device.alloc(64 * 2 ** 20);
    note(runner, device, 300, 1000);
    device.free(big);
  });
});

Deno.test("WasmRunner: a trap on any thread is a typed error, and the runner goes on", async () => {
  await withRunner(3, (runner, device) => {
    const { trap } = runner.module("note.wat", WAT);
    for (const at of [0, 5, 99]) {
      assert.throws(() => runner.run(trap, 100, [at]), {
        name: "FfiError",
        message: /note\.wat: trap failed/,
      });
    }
    runner.run(trap, 100, [-1]);
    note(runner, device, 50, 10);
  });
});

Deno.test("WasmRunner: text that does not assemble is a typed error with its line", async () => {
  await withRunner(1, (runner) => {
    assert.throws(() => runner.module("bad.wat", "(module\n  (func nonsense))"), {
      name: "FfiError",
      message: /bad\.wat.*2:/s,
    });
  });
});

Deno.test("openCpu: properties say what computes", async () => {
  using device = await openCpu({ provider: "wasm", threads: 2 });
  const { providers, nativeBfloat16 } = device.properties();
  const wasm = `WebAssembly ${supportsRelaxedSimd() ? "relaxed SIMD" : "SIMD"}, 2 threads`;
  assert.deepEqual(providers, {
    matmul: wasm,
    conv: wasm,
    "softmax, group norm, activations": wasm,
    other: "TypeScript",
  });
  assert.equal(nativeBfloat16, false);
});

const ROOT = new URL("../../", import.meta.url);

/** Runs a program of its own, with these permissions only, that multiplies two matrices on the CPU and then ends. */
async function multiplyElsewhere(
  permissions: readonly string[],
  env: Record<string, string> = {},
): Promise<{ value: number; matmul: string; conv: string; simd: string }> {
  const program = `
    const { openCpu } = await import("./ffi/cpu/open.ts");
    const { Tensor } = await import("./ffi/tensor.ts");
    const device = await openCpu({ threads: 2 });
    await device.runner.warm();
    const a = Tensor.fromFloat32(device, new Float32Array(300 * 300).fill(1), [300, 300]);
    const out = Tensor.empty(device, [300, 300], "f32");
    device.matmul({ a, b: a, out, constant: true });
    const value = new Float32Array((await device.download(out)).buffer)[89999];
    const { matmul, conv, "softmax, group norm, activations": simd } = device.properties().providers;
    console.log(JSON.stringify({ value, matmul, conv, simd }));`;
  const command = new Deno.Command("deno", {
    args: ["run", "--no-prompt", "--no-check", "--ext", "js", ...permissions, "-"],
    cwd: ROOT,
    env: { ...env, NO_COLOR: "1" },
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  });
  const child = command.spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(program));
  await writer.close();
  const { code, stdout, stderr } = await child.output();
  assert.equal(code, 0, new TextDecoder().decode(stderr));
  return JSON.parse(new TextDecoder().decode(stdout));
}

Deno.test("openCpu: with no permission at all, one thread of WebAssembly does the work", async () => {
  const { value, matmul, conv, simd } = await multiplyElsewhere([]);
  assert.equal(value, 300);
  // Each reason once, where it belongs.
  assert.match(matmul, /^WebAssembly .*1 thread \(oneDNN cannot be opened/);
  assert.match(conv, /^WebAssembly [^(]*1 thread$/);
  assert.match(simd, /^WebAssembly .*1 thread \(no worker threads: .*read access/);
});

Deno.test("FLUX_CPU_THREADS: a number of threads, or an error that names it and its range", async () => {
  const variable = "FLUX_CPU_THREADS";
  const before = Deno.env.get(variable);
  const most = 4 * navigator.hardwareConcurrency;
  const description = async (text: string) => {
    Deno.env.set(variable, text);
    using device = await openCpu({ provider: "wasm" });
    return device.properties().providers.conv;
  };
  try {
    for (const text of ["0", "-1", "abc", "3.5", "1e0", "0x2", "Infinity", String(most + 1), "1000"]) {
      await assert.rejects(description(text), {
        name: "FfiError",
        message: `FLUX_CPU_THREADS is "${text}": give a whole number from 1 to ${most}`,
      });
    }
    assert.match(await description("1"), /, 1 thread$/);
    assert.match(await description(String(most)), new RegExp(`, ${most} threads$`));
    assert.match(await description(""), new RegExp(`, ${navigator.hardwareConcurrency} thread`));
  } finally {
    if (before === undefined) Deno.env.delete(variable);
    else Deno.env.set(variable, before);
  }
});

Deno.test("openCpu: workers need to read their module only, and do not keep the process alive", async () => {
  const folder = fileURLToPath(new URL("ffi/cpu", ROOT));
  const { value, matmul } = await multiplyElsewhere([`--allow-read=${folder}`]);
  assert.equal(value, 300);
  assert.match(matmul, /^WebAssembly .*2 threads \(oneDNN cannot be opened/);
});

Deno.test("openCpu: a libdnnl that does not open is passed by, and properties say why", async () => {
  const folder = await Deno.makeTempDir();
  try {
    await Deno.writeTextFile(`${folder}/libdnnl.so.2`, "not a library");
    const { value, matmul } = await multiplyElsewhere(
      ["--allow-ffi", "--allow-read", "--allow-env=FLUX_LIB_PATH"],
      { FLUX_LIB_PATH: folder },
    );
    assert.equal(value, 300);
    assert.match(matmul, /^WebAssembly .*2 threads \(oneDNN was found but could not be opened/);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
