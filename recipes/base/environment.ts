import type { Device } from "../../ffi/device.ts";
import { isGpu } from "../../ffi/gpu.ts";
import CONFIG from "../../deno.json" with { type: "json" };

/** Where something was measured, for people to read: the device, what computes there, versions. */
export function environmentOf(device: Device): Record<string, string> {
  const { description, providers } = device.properties();
  return {
    device: `${device.name} (${description})`,
    ...providers,
    ...(isGpu(device) ? device.environment() : {}),
    "flux-recipes": CONFIG.version,
    Deno: `${Deno.version.deno} (V8 ${Deno.version.v8}, TypeScript ${Deno.version.typescript})`,
    system: Deno.build.target,
  };
}
