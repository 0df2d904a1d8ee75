/**
 * HIP without a GPU: symbols, values and layouts against HIP's own headers, and the calls that need no GPU against the real
 * libamdhip64 of Debian, which is of ROCm 5.2. What came later is held against newer headers, where there are some.
 */
import assert from "node:assert/strict";
import { FfiError } from "../../ffi/errors.ts";
import { RESULTS } from "../../ffi/gpu_compiler.ts";
import { functionsOf } from "../../ffi/gpu_blaslt_library.ts";
import { HEADER as HIPBLASLT } from "../../ffi/hip/hipblaslt.ts";
import { HEADER as MIOPEN_HEADER, MIOPEN } from "../../ffi/hip/miopen.ts";
import { HipRuntime, openHipLibrary } from "../../ffi/hip/runtime.ts";
import { HEADER, HIP, NEWER_HEADER } from "../../ffi/hip/runtime_header.ts";
import { hipblasLtVersion, hipVersion, rocmSonames } from "../../ffi/hip/versions.ts";
import { compareFunctions, compareWithHip, debiansHeaders, newerHeaders } from "../support/hip_headers.ts";

const API = ["hip/hip_runtime_api.h"];
const debians = await debiansHeaders();
const newer = await newerHeaders();

function headerTest(
  title: string,
  missing: string | undefined,
  body: () => Promise<string | undefined>,
): void {
  Deno.test({
    name: `${title}${missing === undefined ? "" : ` (skipped: ${missing})`}`,
    ignore: missing !== undefined,
    fn: async () => assert.equal(await body(), undefined),
  });
}

const { hipGetDevicePropertiesR0600, ...OLD } = HIP;

headerTest(
  "HIP's constants are those of Debian's headers",
  debians.missing,
  () => compareWithHip(debians, API, HEADER),
);
headerTest(
  "HIP's functions have the parameters of Debian's headers",
  debians.missing,
  () => compareFunctions(debians, API, OLD),
);
headerTest(
  "hipRTC's results are those of Debian's header",
  debians.missing,
  () =>
    compareWithHip(debians, ["hip/hiprtc.h"], {
      HIPRTC_ERROR_INVALID_OPTION: RESULTS.ERROR_INVALID_OPTION,
      HIPRTC_ERROR_COMPILATION: RESULTS.ERROR_COMPILATION,
    }),
);
headerTest(
  "HIP's constants are those of newer headers, too",
  newer.missing,
  () => compareWithHip(newer, API, { ...HEADER, ...NEWER_HEADER }),
);
headerTest(
  "HIP's functions have the parameters of newer headers, too",
  newer.missing,
  () => compareFunctions(newer, API, { ...OLD, hipGetDevicePropertiesR0600 }),
);
headerTest("data types of hipBLASLt are those of newer headers", newer.missing, () => {
  const { HIP_R_32F, HIP_R_16F, HIP_R_16BF, HIP_R_8F_E4M3, HIP_R_8F_E4M3_FNUZ } = HIPBLASLT;
  const types = { HIP_R_32F, HIP_R_16F, HIP_R_16BF, HIP_R_8F_E4M3, HIP_R_8F_E4M3_FNUZ };
  return compareWithHip(newer, ["hip/library_types.h"], types);
});

const BLASLT_API = ["hipblaslt/hipblaslt.h"];
const blaslt = await newerHeaders(BLASLT_API[0]);
headerTest("hipBLASLt's constants and functions are those of its header", blaslt.missing, async () => {
  const text = await Deno.readTextFile(`${blaslt.folder}/hipblaslt/hipblaslt-version.h`);
  const hasModes = Number(/VERSION_MAJOR\s+(\d+)/.exec(text)?.[1]) >= 1;
  const absent = hasModes ? /_VEC_EXT$/ : /_SCALE_MODE$|_OUTER_VEC_32F$/;
  const constants = Object.entries(HIPBLASLT).filter(([name]) => !absent.test(name));
  return await compareWithHip(blaslt, BLASLT_API, Object.fromEntries(constants), "c++") ??
    await compareFunctions(blaslt, BLASLT_API, functionsOf("hipblasLt"));
});

const MIOPEN_API = ["miopen/miopen.h"];
const miopen = await newerHeaders(MIOPEN_API[0]);
headerTest(
  "MIOpen's constants and functions are those of its header",
  miopen.missing,
  async () =>
    await compareWithHip(miopen, MIOPEN_API, MIOPEN_HEADER, "c++") ??
      await compareFunctions(miopen, MIOPEN_API, MIOPEN),
);

headerTest("a wrong value, and a wrong parameter, would be found", debians.missing, async () => {
  const value = await compareWithHip(debians, API, { hipErrorNotReady: 601 });
  assert.match(value ?? "", /hipErrorNotReady is not 601/);
  const parameter = await compareFunctions(debians, API, {
    hipInit: { parameters: ["u64"], result: "i32" },
  });
  assert.match(parameter ?? "", /hipInit/);
  const count = await compareFunctions(debians, API, { hipInit: { parameters: [], result: "i32" } });
  assert.match(count ?? "", /hipInit/);
  return undefined;
});

/** Debian's libamdhip64, or why there is none. */
function openDebians(): HipRuntime | string {
  try {
    return new HipRuntime(openHipLibrary(["libamdhip64.so.5"]));
  } catch (error) {
    if (error instanceof FfiError) return error.message.split(". ")[0];
    throw error;
  }
}

const runtime = openDebians();
const noRuntime = typeof runtime === "string" ? runtime : undefined;

function runtimeTest(title: string, body: (runtime: HipRuntime) => void): void {
  Deno.test({
    name: `libamdhip64: ${title}${noRuntime === undefined ? "" : ` (skipped: ${noRuntime})`}`,
    ignore: noRuntime !== undefined,
    fn: () => body(runtime as HipRuntime),
  });
}

runtimeTest(
  "the real one has all our symbols, but for what came with ROCm 6, and says its version",
  (hip) => {
    assert.match(hipVersion(hip.runtimeGetVersion()), /^5\.\d+\.\d+$/);
    assert.throws(() => hip.deviceArchitecture(0), {
      name: "FfiError",
      message: /has no hipGetDevicePropertiesR0600: it is older than ROCm 6/,
    });
  },
);

// With a GPU of AMD's there is nothing to see here.
runtimeTest("without a GPU an error has the call, HIP's own words and what to do", (hip) => {
  assert.throws(() => hip.getDeviceCount(), {
    name: "FfiError",
    message: /^hip: hipGetDeviceCount failed: hipErrorNoDevice \(100\), \S/,
    hint: /rocminfo lists the GPUs.*render and video/,
  });
  assert.throws(() => hip.deviceGetAttribute(HEADER.hipDeviceAttributeWarpSize, 0), {
    message: /^hip: hipDeviceGetAttribute failed: hipErrorNoDevice|hipErrorInvalidDevice/,
  });
  assert.throws(() => hip.streamCreate(), { message: /^hip: no device was taken/ });
});

Deno.test("versions of HIP and hipBLASLt in words", () => {
  assert.equal(hipVersion(60241133), "6.2.41133");
  assert.equal(hipVersion(70051831), "7.0.51831");
  assert.equal(hipblasLtVersion(1000), "0.10.0");
  assert.equal(hipblasLtVersion(100002), "1.0.2");
  assert.deepEqual(rocmSonames("libamdhip64"), ["libamdhip64.so.7", "libamdhip64.so.6"]);
});
